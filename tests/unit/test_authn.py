"""Tokens: the good ones, and every kind of bad one."""

import asyncio
import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_http import Reply, serving
from signing import (
    CLASSROOM,
    EC_KEY,
    ED_KEY,
    KEYS,
    NOW,
    OTHER_EC_KEY,
    RSA_KEY,
    b64,
    claims,
    jwk_of,
    jwk_set,
    opened,
    pem_of,
    refusal,
    sign,
    token,
)

from presence.authn import Authenticator
from presence.errors import SessionError
from presence.identity import Identity, agent_id_of
from presence.reasons import UNAUTHENTICATED


@pytest.fixture
async def authenticator(tmp_path: Path) -> Authenticator:
    return await opened(jwk_set(jwk_of(EC_KEY, kid="k1")), tmp_path)


# --- good tokens


async def test_a_good_token(authenticator: Authenticator) -> None:
    identity = await authenticator.authenticate(token())
    assert identity == Identity("alice", "school.example", NOW + 3600, frozenset([CLASSROOM]))
    assert agent_id_of("web", identity) == "web.alice.school.example"


async def test_a_token_made_by_pyjwt(authenticator: Authenticator) -> None:
    made = jwt.encode(claims(), EC_KEY, "ES256", headers={"kid": "k1"})
    assert (await authenticator.authenticate(made)).sub == "alice"


@pytest.mark.parametrize("as_pem", [False, True], ids=["jwk", "pem"])
@pytest.mark.parametrize("algorithm", KEYS)
async def test_every_asymmetric_algorithm(algorithm: str, as_pem: bool, tmp_path: Path) -> None:
    key = KEYS[algorithm]
    keys = pem_of(key) if as_pem else jwk_set(jwk_of(key, kid="k1"))
    authenticator = await opened(keys, tmp_path, auth_algorithms=(algorithm,))
    assert (await authenticator.authenticate(token(key, algorithm))).sub == "alice"
    assert await refusal(authenticator, token(key, algorithm)[:-8] + "AAAAAAAA") in {
        "Wrong signature",
        "Malformed token",
    }


async def test_ed448(tmp_path: Path) -> None:
    key = ed448.Ed448PrivateKey.generate()
    authenticator = await opened(jwk_set(jwk_of(key)), tmp_path, auth_algorithms=("EdDSA",))
    assert (await authenticator.authenticate(token(key, "EdDSA"))).sub == "alice"


@pytest.mark.parametrize("kid", ["k1", "other", ...])
async def test_a_pem_key_has_no_id_and_takes_any(kid: Any, tmp_path: Path) -> None:
    authenticator = await opened(b"\n" + pem_of(EC_KEY), tmp_path)
    assert (await authenticator.authenticate(token(EC_KEY, "ES256", kid))).sub == "alice"


async def test_a_token_without_a_key_id_is_tried_with_every_key_that_fits(tmp_path: Path) -> None:
    keys = jwk_set(jwk_of(OTHER_EC_KEY, kid="a"), jwk_of(RSA_KEY, kid="b"), jwk_of(EC_KEY, kid="c"))
    authenticator = await opened(keys, tmp_path, auth_algorithms=("ES256", "RS256"))
    assert (await authenticator.authenticate(token(EC_KEY, "ES256", ...))).sub == "alice"


async def test_a_token_without_a_key_id_costs_a_bounded_number_of_checks(tmp_path: Path) -> None:
    others = [jwk_of(ec.generate_private_key(ec.SECP256R1()), kid=str(n)) for n in range(4)]
    authenticator = await opened(jwk_set(*others, jwk_of(EC_KEY, kid="k1")), tmp_path)
    assert await refusal(authenticator, token(EC_KEY, "ES256", ...)) == "Wrong signature"
    assert (await authenticator.authenticate(token())).sub == "alice"


async def test_keys_of_two_types_may_share_an_id(tmp_path: Path) -> None:
    keys = jwk_set(jwk_of(EC_KEY, kid="k1"), jwk_of(ED_KEY, kid="k1"))
    authenticator = await opened(keys, tmp_path, auth_algorithms=("ES256", "EdDSA"))
    assert (await authenticator.authenticate(token(ED_KEY, "EdDSA"))).sub == "alice"
    assert (await authenticator.authenticate(token())).sub == "alice"


@pytest.mark.parametrize("exp", [int(NOW) + 1, NOW + 0.5, 4_102_444_800, 253_402_300_800])
async def test_expiry_times(exp: float, authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(token(exp=exp))).expires_at == exp


@pytest.mark.parametrize("nbf", [0, NOW - 1, NOW + 4.5])
async def test_not_before_times_within_the_leeway(nbf: float, authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(token(nbf=nbf))).sub == "alice"


@pytest.mark.parametrize("aud", ["school.example", ["school.example"], ["x", "school.example"]])
async def test_the_configured_audience_is_picked(aud: Any, authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(token(aud=aud))).aud == "school.example"


@pytest.mark.parametrize("aud", ["https://a.example/x?y", ["https://a.example/x?y"]])
async def test_without_a_configured_audience_a_single_one_counts(aud: Any, tmp_path: Path) -> None:
    authenticator = await opened(pem_of(EC_KEY), tmp_path, auth_audience=None)
    assert (await authenticator.authenticate(token(aud=aud))).aud == "https://a.example/x?y"


@pytest.mark.parametrize(
    ("claim", "granted"),
    [
        ("*", "*"),
        ([], frozenset()),
        ([str(CLASSROOM).upper()], frozenset([CLASSROOM])),
        (..., None),
        (None, None),
        (str(CLASSROOM), None),
        (["*"], None),
        ([str(CLASSROOM), "*"], None),
        ([str(CLASSROOM), 7], None),
        ([str(CLASSROOM), "not a uuid"], None),
        ([CLASSROOM.hex], None),
        ({str(CLASSROOM): True}, None),
        (True, None),
        ("**", None),
    ],
)
async def test_the_classrooms_claim(claim: Any, granted: Any, authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(token(classrooms=claim))).classrooms == granted


# --- bad tokens: the form


@pytest.mark.parametrize(
    "bad_token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "garbage",
        token() + ".x",
        token() + "=",
        token() + "\n",
        " " + token(),
        "Bearer " + token(),
        token().rsplit(".", 1)[0],
        token().replace(".", ".."),
        token()[1:],
        "é" + token(),
        token() + "\ud800",
        "\0",
        "A" * 60_000,
        "A" * 20_000 + "." + "A" * 20_000 + "." + "A" * 20_000,
        "." * 60_000,
        token(filler="x" * 16_384),
        sign(b"not json", claims()),
        sign(["alg"], claims()),
        sign(b'"ES256"', claims()),
        sign(b"[" * 3000, claims()),
        sign({"alg": "ES256"}, b"not json"),
        sign({"alg": "ES256"}, [claims()]),
        sign({"alg": "ES256"}, b"null"),
        sign({"alg": "ES256"}, b'{"exp":1e999}'),
        sign({"alg": "ES256"}, b'{"sub":"\xff"}'),
    ],
    ids=lambda bad_token: repr(bad_token[:20]),
)
async def test_garbage(bad_token: str, tmp_path: Path) -> None:
    assert await refusal(await opened(pem_of(EC_KEY), tmp_path), bad_token) == "Malformed token"


async def test_a_signature_has_one_spelling(authenticator: Authenticator) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    good = token()
    twin = good[:-1] + alphabet[alphabet.index(good[-1]) + 1]
    assert base64.urlsafe_b64decode(twin.rsplit(".")[-1] + "==") == base64.urlsafe_b64decode(
        good.rsplit(".")[-1] + "=="
    )
    assert await refusal(authenticator, twin) == "Malformed token"


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{0,80}\.[A-Za-z0-9_-]{0,80}\.[A-Za-z0-9_-]{0,90}"))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_raises_anything_but_a_refusal(tmp_path: Path, bad_token: str) -> None:
    asyncio.run(_refused(tmp_path, bad_token))


async def _refused(tmp_path: Path, bad_token: str) -> None:
    await refusal(await opened(pem_of(EC_KEY), tmp_path), bad_token)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
names = st.sampled_from(["sub", "aud", "exp", "nbf", "classrooms", "iat", "alg", "kid", "crit", "typ", "jwk"])


@given(st.dictionaries(names, json_values), st.dictionaries(names, json_values))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_signed_content_raises_anything_but_a_refusal(tmp_path: Path, header: Any, changes: Any) -> None:
    asyncio.run(_accepted_or_refused(tmp_path, sign({"alg": "ES256"} | header, claims(**changes))))


async def _accepted_or_refused(tmp_path: Path, some_token: str) -> None:
    authenticator = await opened(pem_of(EC_KEY), tmp_path)
    try:
        outcome: Any = type(await authenticator.authenticate(some_token))
    except SessionError as error:
        outcome = error.reason
    assert outcome in (Identity, UNAUTHENTICATED)


# --- bad tokens: algorithms and keys


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "", "es256", "ES256 ", None, 256, ["ES256"], {}])
async def test_algorithms_that_are_not_allowed(algorithm: Any, authenticator: Authenticator) -> None:
    for signature in ("", b64(b"x" * 64), token().rsplit(".")[-1]):
        parts = [b64(json.dumps(part).encode()) for part in ({"alg": algorithm, "kid": "k1"}, claims())]
        assert await refusal(authenticator, ".".join([*parts, signature])) == "Algorithm not allowed"


async def test_a_token_without_an_algorithm(authenticator: Authenticator) -> None:
    assert await refusal(authenticator, sign({"kid": "k1"}, claims())) == "Algorithm not allowed"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize("allowed", [("ES256",), tuple(KEYS)])
async def test_a_public_key_is_no_shared_secret(algorithm: str, allowed: tuple[str, ...], tmp_path: Path) -> None:
    jwk = jwk_of(EC_KEY, kid="k1")
    pem = pem_of(EC_KEY)
    der = EC_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    point = EC_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    for keys in (pem, jwk_set(jwk)):
        authenticator = await opened(keys, tmp_path, auth_algorithms=allowed)
        for secret in (pem, pem.strip(), der, point, json.dumps(jwk).encode(), jwk["x"].encode(), keys, b""):
            signing_input = (
                f"{b64(json.dumps({'alg': algorithm, 'kid': 'k1'}).encode())}.{b64(json.dumps(claims()).encode())}"
            )
            digest = hmac.new(secret, signing_input.encode(), getattr(hashlib, f"sha{algorithm[2:]}")).digest()
            assert await refusal(authenticator, f"{signing_input}.{b64(digest)}") == "Algorithm not allowed"


@pytest.mark.parametrize("kid", ["k1", ...])
async def test_another_key(kid: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(OTHER_EC_KEY, "ES256", kid)) == "Wrong signature"


async def test_a_changed_token(authenticator: Authenticator) -> None:
    header, _, signature = token().split(".")
    forged = b64(json.dumps(claims(sub="mallory")).encode())
    assert await refusal(authenticator, f"{header}.{forged}.{signature}") == "Wrong signature"
    assert await refusal(authenticator, f"{header}.{forged}.") == "Wrong signature"
    assert await refusal(authenticator, f"{header}.{forged}.{b64(bytes(64))}") == "Wrong signature"


async def test_an_allowed_algorithm_must_fit_the_key(tmp_path: Path) -> None:
    authenticator = await opened(
        jwk_set(jwk_of(EC_KEY, kid="k1")), tmp_path, auth_algorithms=("ES256", "RS256", "ES384")
    )
    assert await refusal(authenticator, token(RSA_KEY, "RS256")) == "Unknown key"
    assert await refusal(authenticator, token(KEYS["ES384"], "ES384")) == "Unknown key"
    # The right key under a wrong name.
    assert await refusal(authenticator, sign({"alg": "ES384", "kid": "k1"}, claims())) == "Unknown key"


async def test_a_key_bound_to_one_algorithm_does_no_other(tmp_path: Path) -> None:
    keys = jwk_set(jwk_of(RSA_KEY, kid="k1", alg="RS256"))
    authenticator = await opened(keys, tmp_path, auth_algorithms=("RS256", "PS256"))
    assert (await authenticator.authenticate(token(RSA_KEY, "RS256"))).sub == "alice"
    assert await refusal(authenticator, token(RSA_KEY, "PS256")) == "Unknown key"


async def test_an_algorithm_that_is_not_configured(tmp_path: Path) -> None:
    keys = jwk_set(jwk_of(EC_KEY, kid="k1"), jwk_of(RSA_KEY, kid="k2"))
    authenticator = await opened(keys, tmp_path, auth_algorithms=("ES256",))
    assert await refusal(authenticator, token(RSA_KEY, "RS256", "k2")) == "Algorithm not allowed"


@pytest.mark.parametrize("kid", ["unknown", "", "K1", "k1 ", "../../etc/passwd", "' OR 1=1 --", "\0"])
async def test_an_unknown_key_id(kid: str, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(EC_KEY, "ES256", kid)) == "Unknown key"


@pytest.mark.parametrize("kid", [1, True, ["k1"], {"k1": 1}, 1.5])
async def test_a_key_id_that_is_no_string(kid: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(EC_KEY, "ES256", kid)) == "Malformed token"


@pytest.mark.parametrize("crit", [["exp"], [], ["b64"], "b64", None, [1]])
async def test_critical_extensions_are_not_understood(crit: Any, authenticator: Authenticator) -> None:
    header = {"alg": "ES256", "kid": "k1", "crit": crit, "b64": True, "exp": 1}
    assert await refusal(authenticator, sign(header, claims())) == "Malformed token"


async def test_a_detached_payload_is_not_understood(authenticator: Authenticator) -> None:
    header, _, signature = sign({"alg": "ES256", "kid": "k1", "b64": False, "crit": ["b64"]}, claims()).split(".")
    assert await refusal(authenticator, f"{header}..{signature}") == "Malformed token"


async def test_keys_inside_the_token_are_never_looked_at(tmp_path: Path) -> None:
    async with serving(Reply(jwk_set(jwk_of(OTHER_EC_KEY, kid="evil")))) as server:
        authenticator = await opened(jwk_set(jwk_of(EC_KEY, kid="k1")), tmp_path)
        for kid in ("k1", "evil"):
            header = {
                "alg": "ES256",
                "kid": kid,
                "jwk": jwk_of(OTHER_EC_KEY, kid=kid),
                "jku": server.url,
                "x5u": server.url,
                "x5c": [b64(pem_of(OTHER_EC_KEY))],
            }
            await refusal(authenticator, sign(header, claims(), OTHER_EC_KEY))
        # A genuine token may carry them; they just mean nothing.
        header["kid"] = "k1"
        assert (await authenticator.authenticate(sign(header, claims()))).sub == "alice"
        assert server.requests == []


# --- bad tokens: the claims


@pytest.mark.parametrize("exp", [NOW, int(NOW), NOW - 0.001, NOW - 3600, 0, -0.0])
async def test_expired(exp: float, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(exp=exp)) == "Token expired"


@pytest.mark.parametrize(
    "exp", [str(int(NOW) + 60), "never", True, [], {}, [NOW + 60], -1, 1e300, 10**40, 253_402_300_801]
)
async def test_an_expiry_that_is_no_date(exp: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(exp=exp)) == "The token has no usable exp"


@pytest.mark.parametrize("nbf", [NOW + 5.001, NOW + 60, 253_402_300_800])
async def test_not_yet_valid(nbf: float, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(nbf=nbf)) == "Token not yet valid"


@pytest.mark.parametrize("nbf", ["0", True, [], -1, 1e300])
async def test_a_start_that_is_no_date(nbf: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(nbf=nbf)) == "The token has no usable nbf"


@pytest.mark.parametrize(
    ("claim", "title"),
    [("exp", "The token has no exp"), ("sub", "The token has no usable sub"), ("aud", "Wrong audience")],
)
@pytest.mark.parametrize("missing", [..., None])
async def test_required_claims(claim: str, title: str, missing: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(**{claim: missing})) == title


NO_NAMES = [
    "",
    " ",
    "a b",
    "a\n",
    "a\r\nSender-Agent-Id: x",
    "a\tb",
    "a\0",
    "é",
    "a\u2028b",
    "x" * 201,
    7,
    True,
    {},
    None,
]


@pytest.mark.parametrize("sub", [*NO_NAMES, [], ["alice"]], ids=repr)
async def test_subjects_that_cannot_be_a_name(sub: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(sub=sub)) == "The token has no usable sub"


@pytest.mark.parametrize("sub", ["a", "x" * 200, "alice@school.example", "auth0|123", "a.b.c", "!~"])
async def test_subjects_that_can(sub: str, authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(token(sub=sub))).sub == sub


@pytest.mark.parametrize(
    "aud", ["", "other", "School.example", "school.example ", [], ["other"], {"school.example": 1}, 7]
)
async def test_wrong_audiences(aud: Any, authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token(aud=aud)) == "Wrong audience"


@pytest.mark.parametrize(
    "aud", [*NO_NAMES, [], ["a", "b"], ["school.example", "school.example"], [7], [""], [["a"]]], ids=repr
)
async def test_audiences_of_which_none_can_be_picked(aud: Any, tmp_path: Path) -> None:
    authenticator = await opened(pem_of(EC_KEY), tmp_path, auth_audience=None)
    assert await refusal(authenticator, token(aud=aud)) == "The token has no usable aud"


async def test_titles_hold_nothing_of_the_token(authenticator: Authenticator) -> None:
    for changes in ({"sub": "SECRET SECRET"}, {"aud": "SECRET"}, {"exp": "SECRET"}, {"nbf": "SECRET"}):
        assert "SECRET" not in await refusal(authenticator, token(**changes))
    assert "SECRET" not in await refusal(authenticator, sign({"alg": "SECRET", "kid": "SECRET"}, claims()))
    assert "SECRET" not in await refusal(authenticator, token(EC_KEY, "ES256", "SECRET"))
