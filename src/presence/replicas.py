"""This replica among the others: its lease, the sweep of those whose lease ran out, and asking an owner to let go.

Owns when a lease is renewed, when another counts as run out, and what replicas say to each other. Knows nothing of sockets,
frames or SQL.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar
from uuid import UUID, uuid4

import orjson

from presence.errors import SessionError, Unavailable
from presence.log import get
from presence.store import Elsewhere, LetGo

if TYPE_CHECKING:
    from presence.bus import Bus
    from presence.config import Settings
    from presence.metrics import Metrics
    from presence.store import Store

log = get("replicas")

RENEWALS_PER_TTL: Final = 3  # two may fail before the lease runs out
OWNER_TIMEOUT_S: Final = 0.5  # nobody is locked out by a replica that is dead or stands still for longer
RELEASE_SHARE: Final = 0.8  # of that, for an owner to wait for those that do not let go at once
# Of the interval. A database that stood still for longer than these together is noticed before anybody is swept who could not
# renew meanwhile; with the one interval that a heartbeat may be old by then, they make less than a lease.
OVERDUE_SHARE: Final = 1.4
SWEEP_SHARE: Final = 0.5
SWEEP_JITTER_S: Final = 0.1
RETRY_S: Final = 0.25
RECONCILE_INTERVAL_S: Final = 60.0

T = TypeVar("T")
Key = tuple[UUID, str]  # classroom, agent


class Released(NamedTuple):
    """A session that another replica asked for. `was_told`: the others know that it opened, as far as is known here.

    `delivering`: it is of a drain, and its agent goes on hearing its events here until it hangs up.
    """

    was_told: bool
    delivering: bool = False


Release = Callable[[UUID, str, int], Coroutine[Any, Any, Released]]
Remove = Callable[[UUID, str, int], bool]
Deliver = Callable[[Sequence[Key]], Awaitable[Sequence[bool]]]
YES: Final = b"yes"
NO: Final = b"no"


def subject_of(replica_id: UUID, request: Literal["release", "remove", "delivered"]) -> str:
    return f"presence.replica.{replica_id}.{request}"


class Owners:
    """Asks replicas to let go of sessions, to end them, to have sent what they know; and does so when asked."""

    def __init__(self, bus: Bus, metrics: Metrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._subjects: list[str] = []
        self._moving: defaultdict[UUID, list[tuple[Key, asyncio.Future[bool]]]] = defaultdict(list)
        self._under_way: set[asyncio.Task[Any]] = set()

    async def ask(self, owner: UUID, sessions: Sequence[Elsewhere]) -> LetGo:
        """Return when the owner has closed their sockets, or when it has had OWNER_TIMEOUT_S to do so."""
        let_go = LetGo(silent=frozenset(each.session_id for each in sessions))
        payload = orjson.dumps([[each.session_id, str(each.classroom_id), each.agent_id] for each in sessions])
        try:
            subject = subject_of(owner, "release")
            answer = orjson.loads(await self._bus.request(subject, payload, OWNER_TIMEOUT_S, is_idempotent=True))
            let_go = LetGo(*(frozenset(answer[what]) for what in ("untold", "delivering", "silent")))
            outcome = "answered"
        except Unavailable:
            outcome = "silent"
        self._metrics.owners_asked.labels(outcome).inc(len(sessions))
        return let_go

    async def delivered(self, owner: UUID, classroom_id: UUID, agent_id: str) -> bool:
        """Whether a draining owner has sent this agent all that NATS had sent to it by the time of this call.

        Not so when its socket there has gone meanwhile.

        It has OWNER_TIMEOUT_S to say so. Those who ask in one turn of the loop, as many as one proof of the bus has woken,
        are one request.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if owner not in self._moving:
            asyncio.get_running_loop().call_soon(self._ask_delivered, owner)
        self._moving[owner].append(((classroom_id, agent_id), answer))
        has_all = await answer
        self._metrics.hand_overs.labels("proven" if has_all else "unproven").inc()
        return has_all

    def _ask_delivered(self, owner: UUID) -> None:
        self._spawn(self._prove_delivered(owner, self._moving.pop(owner)))

    async def _prove_delivered(self, owner: UUID, moving: list[tuple[Key, asyncio.Future[bool]]]) -> None:
        payload = orjson.dumps([[str(classroom_id), agent_id] for (classroom_id, agent_id), _ in moving])
        proofs = [False] * len(moving)
        try:
            answer = await self._bus.request(subject_of(owner, "delivered"), payload, OWNER_TIMEOUT_S)
            proofs = _parse_proofs(answer, len(moving))
        except (Unavailable, ValueError) as error:
            log.warning(
                "hand_over_unproven", limited=True, agents=len(moving), replica_id=str(owner), error=repr(error)
            )
        finally:
            for (_, waiter), has_all in zip(moving, proofs, strict=True):
                if not waiter.done():
                    waiter.set_result(has_all)

    async def remove(self, owner: UUID, session: Elsewhere) -> bool:
        """Have the owner end a session that an operator wants removed; raises Unavailable when it does not answer."""
        payload = orjson.dumps([session.session_id, str(session.classroom_id), session.agent_id])
        return await self._bus.request(subject_of(owner, "remove"), payload, OWNER_TIMEOUT_S) == YES

    async def serve(self, replica_id: UUID, release: Release, remove: Remove, deliver: Deliver) -> None:
        """Answer what other replicas ask of this one; raises Unavailable when they cannot."""

        async def on_release(payload: bytes) -> bytes:
            releases = {
                number: self._spawn(release(UUID(room), agent_id, number))
                for number, room, agent_id in orjson.loads(payload)
            }
            # One that waits for its turn must not spoil the answer for the others; it is let go all the same.
            await asyncio.wait(releases.values(), timeout=RELEASE_SHARE * OWNER_TIMEOUT_S)
            let_go = {number: task.result() for number, task in releases.items() if task.done()}
            return orjson.dumps(
                {
                    "untold": [number for number, each in let_go.items() if not each.was_told],
                    "delivering": [number for number, each in let_go.items() if each.delivering],
                    "silent": list(releases.keys() - let_go.keys()),
                }
            )

        async def on_remove(payload: bytes) -> bytes:
            number, room, agent_id = orjson.loads(payload)
            return YES if remove(UUID(room), agent_id, number) else NO

        async def on_delivered(payload: bytes) -> bytes:
            moving = [(UUID(room), agent_id) for room, agent_id in orjson.loads(payload)]
            try:
                async with asyncio.timeout(OWNER_TIMEOUT_S):
                    return orjson.dumps(await deliver(moving))
            except (TimeoutError, Unavailable):
                return orjson.dumps([False] * len(moving))

        for subject in self._subjects:
            self._bus.stop_serving(subject)
        answers = {
            subject_of(replica_id, "release"): on_release,
            subject_of(replica_id, "remove"): on_remove,
            subject_of(replica_id, "delivered"): on_delivered,
        }
        self._subjects = list(answers)
        for subject, answer in answers.items():
            await self._bus.serve(subject, answer)
        await self._bus.confirm()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task


def _parse_proofs(answer: bytes, count: int) -> list[bool]:
    """Raises ValueError when it is not so many proofs."""
    proofs = orjson.loads(answer)
    if not isinstance(proofs, list) or len(proofs) != count:
        raise ValueError(f"no answer for {count} agents")
    return [proof is True for proof in proofs]


class Lease:
    """Renews the lease, finds out when it was lost, and sweeps those of others.

    `come_back(replica_id)` brings the live agents of a swept replica back under a new identity; `reconcile()` compares the
    rows with the agents, after a time in which others may have asked in vain: `was_deaf()` says whether there was one.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        metrics: Metrics,
        *,
        come_back: Callable[[UUID], Awaitable[None]],
        reconcile: Callable[[], Awaitable[None]],
        was_deaf: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = settings.lease_ttl_s
        self._interval_s = settings.lease_ttl_s / RENEWALS_PER_TTL
        self._store = store
        self._metrics = metrics
        self._come_back = come_back
        self._reconcile = reconcile
        self._was_deaf = was_deaf
        self._must_reconcile = False
        self._clock = clock
        self._renewed_at = clock()
        self._steady_since: float | None = self._renewed_at  # renewed without a break since then
        self._reconciled_at = self._renewed_at
        self._tasks: list[asyncio.Task[None]] = []
        self.has_others = False
        metrics.lease_age.set_function(lambda: self._clock() - self._renewed_at)

    def open(self) -> None:
        self._tasks = [asyncio.create_task(self._keep(self._renew)), asyncio.create_task(self._keep(self._look_around))]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, step: Callable[[], Awaitable[None]]) -> None:
        """Again and again: a step that fails must not be the last one."""
        while True:
            try:
                await step()
            except SessionError as error:
                log.warning("lease_step_failed", limited=True, error=error.title)
                await asyncio.sleep(RETRY_S)  # the store refuses at once while the database is away: the loop goes on
            except Exception as error:
                log.error("lease_step_failed", limited=True, error=repr(error), exc_info=error)
                await asyncio.sleep(self._interval_s)

    # --- our own

    async def _renew(self) -> None:
        await self._pause()
        started = self._clock()
        stood_still = started - self._renewed_at > self._ttl_s
        try:
            renewed = await self._store.heartbeat()
        except SessionError:
            self._steady_since = None
            raise
        if self._clock() - started > SWEEP_SHARE * self._interval_s:  # the database stood still
            self._steady_since = None
        self._must_reconcile |= self._was_deaf() or stood_still or started - self._reconciled_at > RECONCILE_INTERVAL_S
        if stood_still:
            log.warning("lease_late", stood_still_s=round(started - self._renewed_at, 3))
            self._steady_since = None
        if not renewed:
            replica_id = uuid4()
            log.error("lease_lost", stood_still_s=round(started - self._renewed_at, 3), replica_id=str(replica_id))
            self._metrics.leases_lost.inc()
            await self._come_back(replica_id)
        self._renewed_at = started
        self._steady_since = self._clock() if self._steady_since is None else self._steady_since
        # The lease is renewed whatever becomes of this; should it fail, it is done again.
        if renewed and self._must_reconcile:
            self._reconciled_at = started
            await self._reconcile()
            self._must_reconcile = False

    async def _pause(self) -> None:
        """Until it is time to renew, or a statement has found that there is nothing left to renew."""
        left_s = self._renewed_at + self._interval_s - self._clock()
        if self._steady_since is None:
            left_s = min(self._interval_s, 1.0)
        try:
            async with asyncio.timeout(max(0.0, left_s)):  # not wait_for: it may swallow the cancellation of `close`
                await self._store.swept.wait()
        except TimeoutError:
            return

    # --- the others'

    async def _look_around(self) -> None:
        """Sweep who is dead, then sleep until the next lease may run out."""
        if self._is_steady():
            while (swept := await self._store.sweep(self._ttl_s, SWEEP_SHARE * self._interval_s)) is not None:
                replica_id, count = swept
                self._metrics.sessions_swept.inc(count)
                log.warning("replica_swept", replica_id=str(replica_id), sessions=count)
        left_s = await self._store.next_expiry_s(self._ttl_s)
        self.has_others = left_s is not None
        wait_s = self._interval_s if left_s is None else min(self._interval_s, max(0.0, left_s))
        await asyncio.sleep(wait_s + random.uniform(0, SWEEP_JITTER_S))

    def _is_steady(self) -> bool:
        """After an outage of the database every lease looks run out: the others get the time to renew theirs."""
        now = self._clock()
        is_overdue = now - self._renewed_at > OVERDUE_SHARE * self._interval_s  # the database may stand still right now
        return self._steady_since is not None and now - self._steady_since >= self._ttl_s and not is_overdue
