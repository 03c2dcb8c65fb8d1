"""The client before a server that means no good, and files that cannot be read."""

import contextlib
import http.server
import threading

import pytest

from moco_tf.command import ConfigError
from moco_tf.serving import client


@pytest.fixture
def server():
    """A server on this machine that gives `server.answer` = (status, bytes)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = made.answer
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has read enough
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def ask(server):
    return client.rest(f"127.0.0.1:{server.server_port}", "encoder", 20)([b"image"])


def test_an_answer_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(client, "MOST_BYTES", 1 << 20)
    server.answer = 200, b'{"outputs": {"features": [[' + b"1," * (1 << 20)
    with pytest.raises(client.ServerError, match="answers with more than 1 MB: lower --batch_size"):
        ask(server)


def test_what_a_server_says_steers_no_terminal(server):
    server.answer = 400, b'{"error": "bad\\u001b[2J\\u202eimage"}'
    with pytest.raises(client.ServerError) as refusal:
        ask(server)
    assert str(refusal.value).endswith(r"refuses: 400 bad\x1b[2J\u202eimage")
    server.answer = 500, b"x" * 10_000_000
    with pytest.raises(client.ServerError) as refusal:
        ask(server)
    assert len(str(refusal.value)) < 100_000


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    files = client.image_files(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ConfigError, match=r"a.jpg cannot be read \(No such file or directory\)"):
        client.embed(files, lambda images: {}, 4)
