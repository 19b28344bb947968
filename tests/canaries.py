"""Files that leave a mark if anything runs them, and a count of the connections a process opens."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

PICKLES = (
    "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",  # noqa: E501
    "rng.pkl", "net.mdl",
)  # fmt: skip
SCRIPTS = (
    "modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate.py", "sitecustomize.py", "usercustomize.py", "__init__.py",  # noqa: E501
    "conftest.py",
)  # fmt: skip


def plant(folder, mark):
    """Put one canary of each name into a folder; any of them makes `mark` when it is run. Returns how many."""
    for name in PICKLES:
        (folder / name).write_bytes(f"cos\nmkdir\n(V{mark}\ntR.".encode())
    for name in SCRIPTS:
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    return len(PICKLES) + len(SCRIPTS)


GUARD = """
import ipaddress, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    try:
        local = host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        with open({seen!r}, "a") as file:
            file.write(f"{{event}} {{host}}\\n")
        raise OSError(f"refused by the guard: {{event}} {{host}}")
sys.addaudithook(guard)
"""


def run_guarded(code, folder, cwd, **environ):
    """Run Python code in a process of its own that reaches no other machine; returns it and what it tried.

    Python's own sockets are seen by an audit hook. Libraries with sockets of their own (Rust, Go) and the processes
    they start go through the proxy that the environment names, which listens here and counts.
    """
    seen, calls = folder / "connections", []
    seen.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as one:
                        one.settimeout(5)
                        asked = one.recv(200)
                        if asked:
                            calls.append(asked.split(b"\r\n")[0].decode("latin-1"))

        threading.Thread(target=answer, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), proxy
        )
        switches = (
            "HF_HUB_OFFLINE",
            "LLMTUNE_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_DATASETS_OFFLINE",
            "WANDB_MODE",
            "NO_PROXY",
            "no_proxy",
        )
        inherited = {name: value for name, value in os.environ.items() if name not in switches}
        done = subprocess.run(
            [sys.executable, "-P", "-c", GUARD.format(seen=str(seen)) + code],
            cwd=cwd, env={**inherited, **proxies, **environ}, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        server.shutdown(socket.SHUT_RDWR)
    return done, seen.read_text().splitlines() + calls
