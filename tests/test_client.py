"""The client before a server that means no good, and files that cannot be read."""

import contextlib
import http.server
import json
import threading
import time
import types

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.serving import client, export_client


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
                for part in [body[at : at + 1] for at in range(len(body))] if type(body) is not bytes else [body]:
                    self.wfile.write(part)
                    time.sleep(0.05 * (type(body) is not bytes))

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


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b"[" * 200_000,
        b'{"outputs": [[1, 2]]}',
        b'{"outputs": {}}',
        b'{"outputs": {"features": [[1, 2], [3]]}}',
        b'{"outputs": {"features": 1}}',
        b'{"outputs": {"features": [[1], [2]]}}',
        b'{"outputs": {"features": ["a"]}}',
        b'{"outputs": {"file": [[1]]}}',
    ],
    ids=lambda answer: answer[:60].decode(),
)
def test_an_answer_of_another_form_is_refused(server, tmp_path, answer):
    (tmp_path / "a.jpg").write_bytes(b"image")
    server.answer = 200, answer
    predict = client.rest(f"127.0.0.1:{server.server_port}", "encoder", 20)
    with pytest.raises(client.ServerError, match="does not answer"):
        client.embed([tmp_path / "a.jpg"], predict, 4)


def test_an_image_that_the_server_cannot_have_seen_is_not_looked_up(server, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    text = "images that cannot be decoded, by their index in the batch of 1: [0 99]"
    server.answer = 400, json.dumps({"error": text}).encode()
    predict = client.rest(f"127.0.0.1:{server.server_port}", "encoder", 20)
    with pytest.raises(client.ServerError, match=r"cannot decode .*a.jpg: take them out"):
        client.embed([tmp_path / "a.jpg"], predict, 4)


def test_an_answer_that_drips_ends_after_the_timeout(server):
    class Dripping(bytes):
        """Written a byte at a time."""

    server.answer = 200, Dripping(b'{"outputs": {"features": [[' + b" " * 200)
    with pytest.raises(client.ServerError, match="took more than 1 s: raise --timeout"):
        client.rest(f"127.0.0.1:{server.server_port}", "encoder", 1)([b"image"])


def test_names_of_a_servers_outputs_steer_no_terminal(server, tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff and more")
    server.answer = 200, json.dumps({"outputs": {"f\x1b[2J\n": [[1.0]]}}).encode()
    there = [f"--server=127.0.0.1:{server.server_port}", "--model=encoder", f"--images={tmp_path / 'a.jpg'}"]
    assert export_client.main([*there, f"--output={tmp_path / 'out.npz'}"], "client") == 0
    assert r"f\x1b[2J\n (1, 1)" in capsys.readouterr().out


def test_features_that_are_nan_do_not_agree(monkeypatch, capsys):
    answer = {"embedding": np.ones((1, 2)), "features": np.full((1, 3), np.nan), "\x1b]0;x\x07": np.ones((1, 2))}
    expected = {name: np.ones_like(value) for name, value in answer.items()}
    monkeypatch.setattr(client, "embed", lambda images, predict, batch_size: expected)
    settings = types.SimpleNamespace(compare="models/encoder", batch_size=1)
    assert export_client._compare(settings, ["a.jpg"], answer, None) == 1
    said = capsys.readouterr().out
    assert "differs by more than" in said and "\\x1b]0;x\\x07 0.0e+00" in said and "\x1b" not in said


def test_a_saved_model_that_takes_no_files_is_refused_before_a_server_is_asked(tmp_path, monkeypatch, capsys):
    module = tf.Module()
    module.f = tf.function(lambda x: x, input_signature=[tf.TensorSpec((), tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "other"), signatures={"serving_default": module.f})
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(np.zeros((4, 4, 3), np.uint8)).numpy())
    monkeypatch.setattr(client, "embed", None)
    assert export_client.main([f"--images={tmp_path}/a.png", f"--compare={tmp_path}/other"]) == 2
    error = capsys.readouterr().err
    assert "takes no files of images: it has no signature encoded_images" in error and error.count("\n") == 1
