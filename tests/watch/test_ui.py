"""`llmtune ui`: who is let in, what is answered, and the page in a real browser beside a run at work."""

import contextlib
import http.client
import json
import threading
import time

import pytest

from llmtune.durable import FileLock
from llmtune.training import train as training
from llmtune.watch import pace
from llmtune.watch.ui.server import ROUTES, UiServer
from llmtune.watch.ui.views import RunViews
from report_helpers import HOSTILE, make_run, quiet_losses, write_lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first", quiet_losses(40), heldout=[(0, 4.0), (40, 2.0)])
    make_run(folder / "second", quiet_losses(40), rate=0.002, heldout=[(0, 4.0), (40, 2.5)])
    (folder.parent / "outside.txt").write_text("not for you")
    return folder


@pytest.fixture
def server(runs):
    with UiServer(runs, no_cuda=True) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, *, method="GET", body=None, token=None, **headers):
    """Status, headers and content of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    named = {"Authorization": f"Bearer {server.token if token is None else token}"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in named)
    content = b"" if body is None else json.dumps(body).encode()
    if body is not None:
        named |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    for name, value in named.items():
        connection.putheader(name, value)
    connection.endheaders(content)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_server_listens_to_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32
    assert server.url == f"http://127.0.0.1:{server.server_port}/?token={server.token}"


def test_a_wrong_or_missing_token_is_refused_everywhere(server):
    paths = [("GET", "/"), *((route.method, route.path) for route in ROUTES), ("GET", "/api/nothing")]
    for method, path in paths:
        for wrong in ("", "x", server.token[:-1], server.token + "x", "\u00e9".encode().decode("latin-1")):
            assert ask(server, path, method=method, token=wrong)[0] == 403, (path, wrong)
            assert ask(server, f"{path}?token={wrong.encode().hex()}", method=method, token="")[0] == 403
    assert ask(server, "/", token="")[0] == 403
    assert ask(server, f"/?token={server.token}", token="")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_another_host_is_refused(server, host):
    """A foreign name that is pointed at this machine (DNS rebinding) gets no answer."""
    status, _, content = ask(server, "/api/runs", Host=host)
    assert status == 403
    assert "first" not in content
    assert ask(server, "/api/runs", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_a_foreign_origin_is_refused(server, origin):
    assert ask(server, "/api/runs", Origin=origin)[0] == 403
    assert ask(server, "/api/chat", method="POST", body={"run": "first", "messages": {}}, Origin=origin)[0] == 403
    assert ask(server, "/api/runs", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(server, "/api/runs", Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    "name", ["../outside.txt", "..", ".", "", "/etc", "first/../second", "first%2f..", "first\x00", "..%2f..", "first/"]
)
def test_only_names_of_the_list_are_runs(server, name):
    from urllib.parse import quote

    for path in (f"/api/view?run={quote(name, safe='')}", f"/api/ledger?run={quote(name, safe='')}&text="):
        status, _, content = ask(server, path)
        assert status == 409
        assert "there is no run" in content
    assert ask(server, "/api/chat", method="POST", body={"run": name, "messages": {}})[0] == 409


@pytest.mark.parametrize("path", ["/../outside.txt", "/runs/first/run.json", "/%2e%2e/outside.txt", "//etc/passwd"])
def test_no_file_is_served(server, path):
    status, _, content = ask(server, path)
    assert status == 404
    assert "not for you" not in content


def test_nothing_but_the_chat_takes_a_body(server):
    assert [(route.method, route.path) for route in ROUTES if route.method != "GET"] == [("POST", "/api/chat")]
    assert ask(server, "/api/runs", method="POST", body={})[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(server, "/api/runs", method=method)[0] == 501
    assert ask(server, "/api/chat", method="POST", body=[1])[0] == 400
    assert ask(server, "/api/chat", method="POST", body={"run": "first"})[0] == 400
    assert ask(server, "/api/chat", method="POST", Content_Type="application/json", Content_Length="9999999")[0] == 413


def test_answers_carry_the_headers_that_keep_other_pages_out(server):
    _, headers, content = ask(server, "/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert server.token not in content


def test_runs_are_listed_viewed_compared_and_searched(server):
    listed = json.loads(ask(server, "/api/runs")[2])
    assert {(run["name"], run["state"], run["heldout"]) for run in listed} == {
        ("first", "finished", 2.0),
        ("second", "finished", 2.5),
    }
    view = json.loads(ask(server, "/api/view?run=first")[2])
    assert "training loss" in view["html"]
    same = json.loads(ask(server, f"/api/view?run=first&since={view['stamp']}")[2])
    assert same == {"stamp": view["stamp"]}
    both = json.loads(ask(server, "/api/view?run=first&run=second")[2])["html"]
    assert 'id="wins"' in both
    found = json.loads(ask(server, "/api/ledger?run=first&text=BAD")[2])
    assert (found["count"], found["rows"][0]["fate"]) == (1, "bad")
    assert json.loads(ask(server, "/api/ledger?run=first&text=nothing")[2])["count"] == 0


def test_a_run_at_work_is_drawn_again_only_as_often_as_its_pace_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "available_cores", lambda: 4)
    run = make_run(tmp_path / "a", quiet_losses(2000))
    (run / "run.json").write_text('{"run_id": "0", "state": "running"}')
    with contextlib.ExitStack() as stack:
        stack.callback(FileLock(run / ".lock", "the run").release)
        views, drawn, asked, spent, stamp = RunViews(tmp_path), 0, 0, 0.0, ""
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 2001 + asked, "train_mean_nll": 1.0}) + "\n")
            before = time.monotonic()
            view = views.view(["a"], since=stamp)
            if "html" in view:
                drawn, spent = drawn + 1, spent + time.monotonic() - before
            stamp, asked = view["stamp"], asked + 1
            time.sleep(0.02)
    assert asked > 10
    assert drawn == 1 or (drawn - 1) * spent / drawn < 2 * 0.005 * 1.5
    assert "html" in views.view(["a"], since="")  # who has just opened the page waits for nothing


def test_the_tuned_model_answers_beside_its_base(config_of, tmp_path):
    adapter = ("adapter.method=lora", "adapter.r=4", "training.epochs=1", "evaluation.max_new_tokens=4")
    training.train(config_of(*adapter, "training.learning_rate=0.05", name="tuned"))
    with UiServer(tmp_path / "runs", no_cuda=True) as server:
        folder = server.views.folder_of("tuned")
        asked = [{"role": "user", "content": "the user asks"}]
        answer = server.chat.answer(folder, {"base": asked, "tuned": asked})
    assert set(answer) == {"base", "tuned"}
    assert answer["base"] != answer["tuned"]


def wait_for(browser, script, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.05)
    raise AssertionError(f"never: {script}")


def test_the_page_follows_a_run_at_work_and_compares_what_is_ticked(browser, tmp_path):
    run = make_run(tmp_path / "live", quiet_losses(5), text=HOSTILE)
    make_run(tmp_path / "other", quiet_losses(9))
    (run / "run.json").write_text(json.dumps({**json.loads((run / "run.json").read_text()), "created": "2030"}))
    with UiServer(tmp_path, no_cuda=True) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            browser.get_log("browser")
            browser.get_log("performance")
            browser.get(server.url)
            newest = "charts.length && charts[0].lines[0].x.at(-1)"
            assert wait_for(browser, newest) == 5
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            write_lines(run / "metrics.jsonl", [*lines, {**lines[-1], "step": 6, "train_mean_nll": 0.5}])
            wait_for(browser, "charts.length && charts[0].lines[0].x.at(-1) === 6")
            browser.execute_script("document.querySelector('input[name=other]').click()")
            wait_for(browser, "document.getElementById('differences') !== null")
            assert wait_for(browser, "charts[0].lines.length") == 2
            assert browser.get_log("browser") == []
            urls = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
            asked = [m["params"]["request"]["url"] for m in urls if m["method"] == "Network.requestWillBeSent"]
            assert asked
            assert {url.split("/")[2] for url in asked} == {f"127.0.0.1:{server.server_port}"}
        finally:
            browser.get("about:blank")
            server.shutdown()
            thread.join()
