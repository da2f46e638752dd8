"""The peer: nginx with Debian's nchan module, one channel that every socket listens and speaks to. The process becomes nginx.

A child of it says when the listener is there, as all servers of these benchmarks do, and removes nginx's folder when it has
ended. nginx runs as one process, without a master: what is measured is all of it.

python bench/peers/nchan.py [--ping-interval-s N]
"""

import argparse
import os
import select
import shutil
import tempfile
from pathlib import Path

from ports import announce, free_port

MODULE = "/usr/lib/nginx/modules/ngx_nchan_module.so"
PROGRAM = "/usr/sbin/nginx"
CONNECTIONS = 19_500  # below the descriptor limit
CONFIG = """
load_module {module};
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log /dev/null crit;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    nchan_max_reserved_memory 256M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location /ws {{
            nchan_pubsub websocket;
            nchan_channel_id room;
            nchan_message_buffer_length 1000;
            nchan_subscriber_first_message newest;
            nchan_websocket_ping_interval {ping_interval_s};
        }}
    }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping-interval-s", type=int, default=0, help="0: no pings")
    ping_interval_s = parser.parse_args().ping_interval_s
    port, folder = free_port(), tempfile.mkdtemp(prefix="presence-nchan-")
    values = {"module": MODULE, "folder": folder, "port": port, "connections": CONNECTIONS}
    Path(folder, "nginx.conf").write_text(CONFIG.format(**values, ping_interval_s=ping_interval_s))
    nginx = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        announce(port)
        select.select([nginx], [], [])
        shutil.rmtree(folder)
        os._exit(0)
    os.execv(PROGRAM, [PROGRAM, "-c", f"{folder}/nginx.conf"])


if __name__ == "__main__":
    main()
