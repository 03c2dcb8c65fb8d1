"""A storm of requests on an exported model in a server process: answers, memory, latency.

    python tests/storms/server.py --requests=100000 --clients=8

The server is the stand-in of the tests (tests/stand_in_server.py), which runs the SavedModel in TensorFlow and speaks
TF Serving's protocols; the clients ask by REST and gRPC in turn, as moco_tf.serving.export client does. A request has
1 to 8 files of mixed formats and sizes. In one of four something cannot be decoded: it has to be refused, naming the
right places. One of fifty has more pixels than a request may have. Every answer is held against the SavedModel's.
Ends with status 1 where an answer is wrong or memory grows by 1 % (the means of the second and the last tenth; from
10^5 requests on).
"""

import argparse
import io
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

SERVER = Path(__file__).parent.parent / "stand_in_server.py"
CLOSE = 1e-4  # max|difference| / max|value| of an output
ENOUGH = 100_000  # requests from which on the server's memory is judged
GROWTH = 1.0  # percent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one_arena", action="store_true", help="glibc gives the server's memory back at once")
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    import keras

    import moco_tf
    from moco_tf.serving import client

    keras.utils.set_random_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = moco_tf.MoCo(moco_tf.encoders.resnet.resnet10(image_size=32, width=4), dim=8, queue_size=64)
        moco_tf.export_encoder(model, Path(folder) / "encoder/1")
        server, ports = start(Path(folder), arguments.one_arena)
        try:
            asks = [getattr(client, name)(f"localhost:{port}", "encoder", 600) for name, port in ports.items()]
            local = client.local(Path(folder) / "encoder")
            figures = storm(
                asks, local, arguments.requests, arguments.clients, arguments.seed, lambda: rss(server.pid)
            )
        finally:
            server.terminate()
            server.wait()
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    too_much = arguments.requests >= ENOUGH and figures["memory growth, %"] >= GROWTH
    return 1 if figures["wrong"] or too_much else 0


def start(models, one_arena=False):
    """A server process of the models' folder; its ports, {protocol: port}.

    one_arena: whether glibc gives memory back at once, in place of holding some ready for each thread.
    """
    sockets = {name: socket.create_server(("localhost", 0)) for name in ("rest", "grpc")}
    ports = {name: of.getsockname()[1] for name, of in sockets.items()}
    for of in sockets.values():
        of.close()
    config = f"""model_config_list {{ config {{
        name: "encoder" base_path: "{models}/encoder" model_platform: "tensorflow"
        model_version_policy {{ specific {{ versions: 1 }} }}
    }} }}"""
    (models / "models.config").write_text(config)
    command = [
        sys.executable, str(SERVER), f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}",
        f"--model_config_file={models}/models.config",
        f"--grpc_channel_arguments=grpc.max_receive_message_length={2**28}",
    ]  # fmt: skip
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"} if one_arena else {}
    with open(models / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | allocator)
    while True:
        if server.poll() is not None:
            sys.exit((models / "server.log").read_text())
        try:
            socket.create_connection(("localhost", ports["rest"]), 5).close()
            return server, ports
        except OSError:
            time.sleep(0.2)


def rss(process):
    """Bytes of memory that a process has, of Linux."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files(seed):
    """(files that can be decoded, files that cannot, one of which seven are too many pixels for a request)."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    good = []
    for format, settings in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WebP", {}),
    ):  # fmt: skip
        for _ in range(6):
            image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
            image = image.resize(rng.integers(8, 300, 2).tolist(), Image.BICUBIC)
            file = io.BytesIO()
            image.save(file, format, **settings)
            good.append(file.getvalue())
    cut = [file[: len(file) // 2] for file in good[::6]]
    bad = [b"", b"no image", b"\xff\xd8\xff", bytes(1000), rng.bytes(1000), *cut]
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 2 * (9000).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return good, bad, header


def storm(asks, local, number, clients, seed=0, memory=lambda: 0):
    """Sends `number` requests from `clients` threads; returns what came back, as figures.

    asks: functions as `moco_tf.serving.client` makes them, of which clients take turns; local: one to compare with.
    memory: bytes that the server has.
    """
    from moco_tf.serving.agreement import deviation
    from moco_tf.serving.client import ServerError

    good, bad, large = files(seed)
    known = local(good)
    lock, wrong, seconds, held = threading.Lock(), [], [], []

    def request(place):
        """(files, why they are to be refused, the rows of `known` that are the answer)."""
        draw = random.Random(seed * 1_000_003 + place)
        if draw.random() < 0.02:
            return 7 * [large], "--request_megapixels", None
        rows = [draw.randrange(len(good)) for _ in range(draw.randint(1, 8))]
        sent = [good[row] for row in rows]
        if draw.random() >= 0.25:
            return sent, None, rows
        at = sorted(draw.sample(range(len(sent)), draw.randint(1, len(sent))))
        for index in at:
            sent[index] = draw.choice(bad)
        return sent, re.escape(f"in the batch of {len(sent)}: [{' '.join(map(str, at))}]"), None

    def verdict(place):
        sent, refusal, rows = request(place)
        begin = time.perf_counter()
        try:
            answer = asks[place % len(asks)](sent)
        except ServerError as error:
            took = time.perf_counter() - begin
            return took, None if refusal and re.search(refusal, str(error)) else str(error)
        took = time.perf_counter() - begin
        if refusal:
            return took, "answered what it has to refuse"
        farthest = deviation(answer, {name: value[rows] for name, value in known.items()})
        return took, None if farthest < CLOSE else f"{farthest:.1e} of the largest value away"

    places = iter(range(number))

    def work():
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                took, problem = verdict(place)
            except Exception as error:  # nothing that a client meets may end the count
                took, problem = float("nan"), f"{type(error).__name__}: {error}"
            with lock:
                seconds.append(took)
                if problem:
                    wrong.append(f"request {place}: {problem}")
                if len(seconds) % max(number // 100, 1) == 0:
                    held.append(memory())

    begin = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.nanpercentile(seconds, [50, 99])
    for line in wrong[:10]:
        print(line)
    tenth = max(len(held) // 10, 1)
    early, late = np.mean(held[tenth : 2 * tenth] or held), np.mean(held[-tenth:])
    print("server's memory, MB, by hundredths:", *(round(each / 1e6) for each in held))
    return {
        "requests": len(seconds),
        "right": len(seconds) - len(wrong),
        "wrong": len(wrong),
        "latency p50, ms": 1e3 * float(p50),
        "latency p99, ms": 1e3 * float(p99),
        "requests a second": number / (time.perf_counter() - begin),
        "server's memory in the second tenth, MB": early / 1e6,
        "server's memory in the last tenth, MB": late / 1e6,
        "memory growth, %": 100 * (late / early - 1) if early else 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
