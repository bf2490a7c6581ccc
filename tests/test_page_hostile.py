"""Two hundred hostile requests to the page's server: none succeeds, and the server lives."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from graphs import by_hand
from page_client import EDITS, Client, serving

import pycircuit as pc
from pycircuit.page.edits import FILE
from pycircuit.page.guard import LARGEST_BODY, host_name

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPH = "/api/graphs/good.safetensors"
SECRET = "the secret of another folder"


class Attack(NamedTuple):
    """A request that must not succeed. headers: Host is the server's own unless it is there."""

    kind: str
    method: str
    path: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    path = root / "graphs"
    path.mkdir()
    by_hand().save(path / "good.safetensors")
    by_hand().save(root / "secret.safetensors")
    (root / "secret.json").write_text(json.dumps({"metadata": {"prompt": SECRET}, "nodes": [], "links": []}))
    (root / "secret.txt").write_text(SECRET)
    (path / "linked.safetensors").symlink_to(root / "secret.safetensors")
    (path / "linked.json").symlink_to("../secret.json")
    (path / "passwords.json").symlink_to("/etc/passwd")
    (path / ".hidden.safetensors").symlink_to(root / "secret.safetensors")
    (path / "notes.txt").write_text(SECRET)
    (path / "folder.json").mkdir()
    os.mkfifo(path / "pipe.json")
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(folder) as client:
        yield client


PATHS = [
    "/../secret.txt", "/..%2fsecret.txt", "/%2e%2e/secret.txt", "/static/../../secret.txt", "/....//secret.txt",
    "/etc/passwd", "//etc/passwd", "/%2fetc%2fpasswd", "/..\\secret.txt", "/..%5csecret.txt", "/.git/config",
    "/api/graphs/../../secret.safetensors", "/api/graphs/..%2fsecret.safetensors", "/api/graphs/%2e%2e%2fsecret.json",
    "/api/graphs/..%252fsecret.json", "/api/graphs/%2fetc%2fpasswd", "/api/graphs/linked.safetensors",
    "/api/graphs/linked.json", "/api/graphs/passwords.json", "/api/graphs/.hidden.safetensors",
    "/api/graphs/notes.txt", "/api/graphs/folder.json", "/api/graphs/pipe.json", "/api/graphs/good",
    "/api/graphs/good.safetensors%00", "/api/graphs/good.safetensors%00.json", "/api/graphs/GOOD.safetensors",
    "/api/graphs/good.safetensors/", "/api/graphs/.", "/api/graphs/..", "/api/graphs/%20", "/api/graphs/",
    "/api/graphs/" + "a" * 7000, f"/api/graphs/{FILE}", "/api/graphs/good.safetensors/../linked.json",
    "/api/graphs/linked.safetensors/node?id=token/0", "/api/graphs/linked.json/edits", "/api/graphs/~root",
    "/api/graphs/linked.json/export.json", "/api/graphs/%ff%fe", "/api/features/../../etc", "/api/features/0/../x",
    "/api/features/0/%2e%2e%2f5", "/api/nothing", "/api", "/api/", "/api/state/more", "/api/traces/..%2f/events",
]  # fmt: skip

HOSTS = [
    "evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example:{port}", "",
    "localhost@evil",
    "evil.example#localhost", "[::ffff:8.8.8.8]", "8.8.8.8", "0.0.0.0", "192.168.0.1:{port}", "localhost:port",
    "localhost:",
    "localhost/..", "127.1", "2130706433", "0x7f000001", "[::1", "::1]", "local host", "localhost,evil.example",
    "LOCALHOST.", "metadata.google.internal", "169.254.169.254", "xn--lcalhost-9hb",
]  # fmt: skip

ORIGINS = [
    "http://evil.example", "https://evil.example", "null", "http://localhost.evil.example", "file://", "http://localhost",
    "http://127.0.0.1", "http://127.0.0.1:1", "http://127.0.0.1:{port}.evil.example", "http://evil@127.0.0.1:{port}",
    "http://127.0.0.1:{port}/path", "ftp://127.0.0.1:{port}", "chrome-extension://abc", "http://[::1]:{port}", "",
]  # fmt: skip

QUERIES = [
    "node_threshold=2", "node_threshold=-1", "node_threshold=nan", "node_threshold=inf", "node_threshold=x",
    "edge_threshold=1e999", "edge_threshold=", "max_nodes=0", "max_nodes=-5", "max_nodes=1e9",
    "max_nodes=99999999999999",    "max_nodes=٣", "node_threshold=" + "9" * 2000,
]  # fmt: skip

NODES = [
    "", "0", "../../x", "token/99", "target/-1", "error/9/9", "error/0", "0/0/5/6",
    "1e3/0/0", "0/0/99999999999999999999",
    "token/%00", "0/0/5 ", "%0a0/0/5", "١/0/5", "<script>",
]  # fmt: skip

EDIT_BODIES: list[object] = [
    [], 7, None, "text", {}, {"revision": 0}, {"revision": 0, "document": []}, {"revision": 0, "document": {"x": 1}},
    {"revision": "0", "document": {}}, {"revision": True, "document": {}}, {"revision": -1, "document": {}},
    {"revision": 10**30, "document": {}}, {"revision": 0, "document": {"pins": ["../x"]}},
    {"revision": 0, "document": {"pins": "token/0"}}, {"revision": 0, "document": {"pins": [["token/0"]]}},
    {"revision": 0, "document": {"pins": [f"token/{n}" for n in range(5001)]}},
    {"revision": 0, "document": {"labels": {"0/5": 7}}}, {"revision": 0, "document": {"labels": {"../5": "x"}}},
    {"revision": 0, "document": {"labels": {"0/5": "x" * 401}}},
    {"revision": 0, "document": {"labels": {"0/5": "a\nb"}}},
    {"revision": 0, "document": {"groups": [{"name": "x"}]}}, {"revision": 0, "document": {"groups": {"a": 1}}},
    {"revision": 0, "document": {"groups": [{"name": "x", "nodes": ["token/0"], "more": 1}]}},
    {"revision": 0, "document": {"groups": [{"name": n, "nodes": ["token/0"]} for n in "ab"]}},
    {"revision": 0, "document": {"groups": [{"name": "x", "nodes": [], "collapsed": "yes"}]}},
    {"revision": 0, "document": {"layout": {"a": [1]}}}, {"revision": 0, "document": {"layout": {"a": [1, "2"]}}},
    {"revision": 0, "document": {"layout": {"a": [1e300, 0]}}},
    {"revision": 0, "document": {"labels": {"0/5": "\ud800"}}},
    {"revision": 0, "document": {"__proto__": {}}},
]  # fmt: skip

RAW_BODIES = [
    b"{", b"\xff\xfe", b"[" * 100_000, b'{"revision": NaN, "document": {}}', b'{"a":' * 50_000,
    b"null", b"1e999", b"\x00",
    b"{'revision': 0}", b'{"revision": 0, "document": {"layout": {"a": [NaN, 1]}}}',
    b'{"revision": 0, "document": {"layout": {"a": [Infinity, 1]}}}', b"revision=0&document={}",
]  # fmt: skip


def attacks() -> Iterator[Attack]:
    """Every attack; those that would succeed but for their one fault come with all else right."""
    good = json.dumps({"revision": 0, "document": {"pins": ["token/0"]}}).encode()
    yield from (Attack("path", "GET", path) for path in PATHS)
    for host in HOSTS:
        yield Attack("host", "GET", "/api/state", {"Host": host})
    yield from (Attack("host", "PUT", f"{GRAPH}/edits", {**EDITS, "Host": host}, good) for host in HOSTS[:8])
    yield from (Attack("origin", "PUT", f"{GRAPH}/edits", {**EDITS, "Origin": origin}, good) for origin in ORIGINS)
    for origin in ORIGINS[:4]:
        yield Attack("origin", "GET", "/api/state", {"Origin": origin})
    for site in ("cross-site", "same-site"):
        yield Attack("site", "GET", "/api/state", {"Sec-Fetch-Site": site})
        yield Attack("site", "GET", "/api/state", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"})
        yield Attack("site", "PUT", f"{GRAPH}/edits", {**EDITS, "Sec-Fetch-Site": site}, good)
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", ""):
        yield Attack("form", "POST", f"{GRAPH}/edits", {"Content-Type": kind}, good)
        yield Attack("form", "PUT", f"{GRAPH}/edits", {"Content-Type": kind}, good)
        yield Attack("form", "PUT", f"{GRAPH}/edits", {"Content-Type": kind, "X-Pycircuit": "1"}, good)
    yield Attack("form", "PUT", f"{GRAPH}/edits", {**EDITS, "X-Pycircuit": "0"}, good)
    yield Attack("form", "PUT", f"{GRAPH}/edits", {"Content-Type": "application/json"}, good)
    for method in ("TRACE", "CONNECT", "PATCH", "OPTIONS", "PROPFIND", "DELETE", "POST", "put"):
        yield Attack("method", method, "/api/state", EDITS)
    yield from (Attack("method", method, GRAPH, EDITS) for method in ("POST", "DELETE", "PUT"))
    yield Attack("method", "POST", f"{GRAPH}/edits", EDITS, good)
    yield from (Attack("query", "GET", f"{GRAPH}?{query}") for query in QUERIES)
    yield from (Attack("query", "GET", f"{GRAPH}/node?id={node}") for node in NODES)
    yield Attack("query", "GET", f"{GRAPH}/node")
    yield Attack("query", "GET", f"{GRAPH}/paths?source=token/0")
    yield Attack("query", "GET", f"{GRAPH}/search?q={'x' * 1500}")
    yield Attack("size", "GET", f"/api/state?{'x' * 9000}")
    yield Attack("size", "GET", "/api/state", {"X-Long": "x" * 100_000})
    yield Attack("size", "PUT", f"{GRAPH}/edits", EDITS, b" " * (LARGEST_BODY + 1))
    yield Attack("size", "PUT", f"{GRAPH}/edits", {**EDITS, "Content-Length": str(1 << 50)})
    yield Attack("size", "PUT", f"{GRAPH}/edits", {**EDITS, "Content-Length": "-1"})
    yield from (Attack("json", "PUT", f"{GRAPH}/edits", EDITS, json.dumps(body).encode()) for body in EDIT_BODIES)
    yield from (Attack("json", "PUT", f"{GRAPH}/edits", EDITS, body) for body in RAW_BODIES)
    for body in (b'{"text": 7}', b'{"text": "http://evil.example/"}', b'{"text": "?supernodes={}"}', b"{}"):
        yield Attack("json", "POST", f"{GRAPH}/import", EDITS, body)
    yield from (Attack("model", "POST", f"/api/{what}", EDITS, b'{"prompt": "x"}') for what in ("traces", "estimate"))


def sent(client: Client, attack: Attack) -> int | None:
    """Status of an attack, written to a socket byte by byte as it is; None where the connection was closed."""
    headers = {"Host": f"{client.host}:{client.port}", "Connection": "close", **attack.headers}
    if attack.body:
        headers.setdefault("Content-Length", str(len(attack.body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).replace("{port}", str(client.port))
    request = f"{attack.method} {attack.path} HTTP/1.1\r\n{lines}\r\n".encode() + attack.body
    with closing(socket.create_connection((client.host, client.port), timeout=10)) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                answer += chunk
    assert SECRET.encode() not in answer and b"root:" not in answer
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None


def _files(folder: Path) -> dict[str, int]:
    """Times of change of everything in a folder but folders and the edits."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() and path.name != FILE]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def test_two_hundred_hostile_requests_fail_and_the_server_lives(client: Client, folder: Path) -> None:
    before = _files(folder.parent)
    every = list(attacks())
    assert len(every) >= 200
    answers = [(attack, sent(client, attack)) for attack in every]
    succeeded = [(attack[:3], code) for attack, code in answers if code is not None and not 400 <= code < 600]
    crashed = [(attack[:3], code) for attack, code in answers if code is not None and code >= 500]
    assert not succeeded and not crashed, (succeeded, crashed)
    assert _files(folder.parent) == before
    assert client.get(f"{GRAPH}/edits")["revision"] == 0
    assert [graph["name"] for graph in client.get("/api/state")["graphs"]] == ["good.safetensors"]


def test_foreign_files_are_errors_and_not_more(tmp_path: Path) -> None:
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    (tmp_path / "header.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (tmp_path / "deep.json").write_bytes(b"[" * 200_000)
    (tmp_path / "huge.json").write_bytes(b'{"metadata": {"prompt_tokens": [1e999]}, "nodes": [], "links": []}')
    (tmp_path / "other.json").write_text('{"prompt": "<script>alert(1)</script>"}')
    (tmp_path / "<img src=x>.json").write_text("{}")
    with serving(tmp_path) as client:
        graphs = client.get("/api/state")["graphs"]
        assert len(graphs) == 6
        for graph in graphs:
            status, content = client.call(
                "GET", f"/api/graphs/{graph['name'].replace('<img src=x>', '%3Cimg%20src=x%3E')}"
            )
            assert status == 400 and "must" in content["error"], content
        assert all(graph["error"] for graph in client.get("/api/state")["graphs"])
    assert not (tmp_path / "hacked").exists()


def test_a_foreign_database_is_not_touched(tmp_path: Path) -> None:
    by_hand().save(tmp_path / "good.safetensors")
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
    before = (tmp_path / FILE).read_bytes()
    body = {"revision": 0, "document": {"pins": ["token/0"]}}
    with serving(tmp_path) as client:
        assert client.call("PUT", f"{GRAPH}/edits", body)[0] == 400
        assert (tmp_path / FILE).read_bytes() == before
        (tmp_path / FILE).write_bytes(b"no database at all" * 100)
        status, content = client.call("PUT", f"{GRAPH}/edits", body)
        assert status == 500 and FILE in content["error"]
        (tmp_path / FILE).unlink()
        (tmp_path / FILE).symlink_to(tmp_path.parent / "outside.sqlite")
        assert client.call("PUT", f"{GRAPH}/edits", body)[0] == 400
        assert not (tmp_path.parent / "outside.sqlite").exists()
        (tmp_path / FILE).unlink()
        assert client.call("PUT", f"{GRAPH}/edits", body)[0] == 200


def test_a_token_is_demanded_and_compared(tmp_path: Path) -> None:
    token = "correct-horse-battery"
    with serving(tmp_path, token=token) as client:
        assert client.page.address.endswith(f"/?token={token}")
        wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": token}]
        cookies = (f"pycircuit-{client.port}=wrong", f"pycircuit-1={token}", "\x01;;==;")
        for headers in [*wrong, *({"Cookie": cookie} for cookie in cookies)]:
            assert client.raw("GET", "/api/state", headers=headers)[0] == 401
        assert client.raw("GET", "/?token=wrong")[0] == 401
        assert client.raw("POST", f"/?token={token}", headers=EDITS)[0] == 401
        status, headers, _ = client.raw("GET", f"/?token={token}")
        assert status == 303 and "HttpOnly" in headers["set-cookie"] and "SameSite" in headers["set-cookie"]
        cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
        assert client.raw("GET", "/api/state", headers=cookie)[0] == 200
        assert client.raw("GET", "/api/state", headers={"Authorization": f"Bearer {token}"})[0] == 200


def test_other_hosts_demand_a_token(tmp_path: Path) -> None:
    for options in ({"host": "0.0.0.0"}, {"host": "0.0.0.0", "token": "short"}, {"host": "no.such.host.invalid"},
                    {"token": "with spaces and ; signs"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"serve: (token|host) must"):
            pc.serve(tmp_path, port=0, **options)  # type: ignore[arg-type]
    with serving(tmp_path, host="0.0.0.0", token="correct-horse-battery") as client:
        bearer = {"Authorization": "Bearer correct-horse-battery"}
        assert client.raw("GET", "/api/state", headers={**bearer, "Host": f"10.1.2.3:{client.port}"})[0] == 200
        assert client.raw("GET", "/api/state", headers={**bearer, "Host": "rebound.example"})[0] == 421


def test_answers_keep_browsers_from_the_rest(client: Client) -> None:
    for path in ("/api/state", "/api/nothing", "/"):
        _, headers, _ = client.raw("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "access-control-allow-origin" not in headers and headers["x-content-type-options"] == "nosniff"


def test_names_of_hosts_are_read_strictly() -> None:
    assert host_name("LocalHost:80") == "localhost" and host_name("[::1]:8") == "::1" and host_name("[::1]") == "::1"
    for wrong in ("", "a b", "[::1", "[x]:1", "a:b", "a:1:2", "a/b", "a@b", "é", "[::1]x", "a:999999"):
        assert host_name(wrong) is None, wrong


def test_a_body_that_never_comes_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.page.guard.BODY_SECONDS", 0.2)
    with serving(folder) as client:
        slow = Attack("slow", "PUT", f"{GRAPH}/edits", {**EDITS, "Content-Length": "100"})
        assert sent(client, slow) == 408
        assert client.get("/api/state")["graphs"]
