"""What docs/serving.md promises: its commands, the client over both protocols, the server's files.

The server is tensorflow_model_server where it is on the PATH, and always a stand-in (stand_in_server.py).
"""

import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from storms import server

from export import classifier as export_classifier
from export import client as export_client
from export import encoder as export_encoder
from moco_tf import build, frozen, run_folder
from moco_tf import config as config_lib
from moco_tf.checkpoint import Checkpoints
from moco_tf.command import ConfigError
from moco_tf.data import sources
from moco_tf.serving import agreement, client

REPOSITORY = Path(__file__).parent.parent
SERVING = REPOSITORY / "export/serving"
needs_api = pytest.mark.skipif(
    not importlib.util.find_spec("tensorflow_serving"),
    reason="tensorflow-serving-api is not installed: pip install 'moco_tf[serving]'",
)
SERVERS = [
    pytest.param("stand-in", marks=needs_api),
    pytest.param(
        "tensorflow_model_server",
        marks=pytest.mark.skipif(
            not shutil.which("tensorflow_model_server"), reason="tensorflow_model_server is not on the PATH"
        ),
    ),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """What `moco_tf.train` leaves of a run, as far as export reads it."""
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    flags = ["--arch=resnet10", "--width=4", "--image_size=32", "--stem=imagenet", "--augment=cifar",
             "--batch_size=32", "--queue_size=64", "--dim=8", "--bn_groups=1", "--knn_every=0"]  # fmt: skip
    config = config_lib.parse(flags)
    folder.mkdir()
    (folder / "config.flags").write_text(config.flag_lines())
    (folder / "data.json").write_text('{"images": 10000}')
    Checkpoints(folder / "checkpoints", build.model(config, run_folder.Data(config.batch_size))).save()
    return folder


@pytest.fixture(scope="module", params=SERVERS)
def work(request, run_dir, tmp_path_factory):
    """A folder in which the commands of docs/serving.md run: the repository's code, a run, images, a server."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "export").symlink_to(REPOSITORY / "export")
    (folder / "runs").symlink_to(run_dir.parent)
    (folder / "photos/more").mkdir(parents=True)
    for number, record in enumerate(sources.embedded("test").in_order().take(5).as_numpy_iterator()):
        (folder / f"photos/{number}.jpg").write_bytes(record["image"])
    wide = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    (folder / "photos/more/wide.png").write_bytes(tf.io.encode_png(wide).numpy())
    (folder / "photos/notes.txt").write_text("no image")
    programs = folder / "bin"
    programs.mkdir()
    program(programs / "python", "")
    if request.param == "stand-in":
        program(programs / "tensorflow_model_server", REPOSITORY / "tests/stand_in_server.py")
    return folder


def program(path, script):
    """Makes a command that runs a script in this Python."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
    path.chmod(0o755)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(work):
    """Runs the document's first two commands; gives a function that runs the others, and the ports."""
    ports = {"8501": str(free_port()), "8500": str(free_port())}
    environment = os.environ | {
        "PATH": f"{work}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "GRPC_PORT": ports["8500"],
        "REST_PORT": ports["8501"],
        "HOST": "0.0.0.0",  # else Docker is asked for, where the server can be kept to one address
        "MESSAGE_MB": "4",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def run(command):
        command = command.replace("8501", ports["8501"])
        command = command.replace("--protocol=grpc", f"--protocol=grpc --server=localhost:{ports['8500']}")
        command = command.replace("--output=photos.npz", f"--output=photos.npz --server=localhost:{ports['8501']}")
        started = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=work, env=environment, capture_output=True, text=True
        )
        assert started.returncode == 0, started.stdout + started.stderr
        return started.stdout

    export, serve, ask, embed = commands()
    assert "Wrote models/encoder/1." in run(export)
    with open(work / "server.log", "w") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {serve}"], cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(process, f"http://localhost:{ports['8501']}/v1/models/encoder", work / "server.log")
        yield {"run": run, "ask": ask, "embed": embed, "rest": f"localhost:{ports['8501']}",
               "grpc": f"localhost:{ports['8500']}", "models": work / "models", "photos": work / "photos"}  # fmt: skip
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def commands():
    return re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs/serving.md").read_text(), re.DOTALL)


def wait_for(process, url, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if json.load(answer)["model_version_status"][0]["state"] == "AVAILABLE":
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def answers(served, files):
    signature = frozen.load(served["models"] / "encoder").signatures["encoded_images"]
    found = signature(images=tf.constant([file.read_bytes() for file in files]))
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on the PATH")
def test_the_documents_request_by_curl_returns_the_images_vectors(served):
    outputs = json.loads(served["run"](served["ask"]))["outputs"]
    expected = answers(served, [served["photos"] / "1.jpg"])
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)


def test_the_documents_clients_embed_the_folder_as_the_saved_model_does(served):
    printed = served["run"](served["embed"])
    assert "6 images in" in printed and "The server agrees with models/encoder" in printed
    with np.load(served["photos"].parent / "photos.npz") as found:
        files = [served["photos"].parent / file for file in found["files"]]
        assert [file.name for file in files] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "wide.png"]
        assert agreement.deviation({n: found[n] for n in found if n != "files"}, answers(served, files)) < 1e-4


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_both_protocols_give_the_same_in_small_batches_by_version_and_label(served, protocol):
    files = client.image_files(served["photos"])
    expected = answers(served, files)
    for chosen in ({}, {"version": 1}, {"label": "stable"}):
        predict = getattr(client, protocol)(served[protocol], "encoder", 60, **chosen)
        found = client.embed(files, predict, batch_size=4)
        assert agreement.deviation(found, expected) < 1e-4
        assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_refusal_is_one_line_that_names_the_file_or_the_model(served, protocol, tmp_path):
    ask = getattr(client, protocol)
    files = client.image_files(served["photos"])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(files[0].read_bytes()[:40])
    for model, images, wrong in (
        ("encoder", [*files[:3], broken], f"cannot decode {broken}: take them out"),
        ("encodr", files, "Servable not found"),
    ):
        with pytest.raises(ConfigError, match=re.escape(wrong)) as error:
            client.embed(images, ask(served[protocol], model, 60), batch_size=2)
        assert "\n" not in str(error.value)


def test_a_request_by_grpc_beyond_the_messages_limit_ends_in_a_line(served):
    with pytest.raises(ConfigError, match=r"refuses: .*larger than max \(\d+ vs. 4194304\)") as error:
        client.grpc(served["grpc"], "encoder", 60)([bytes(5 << 20)])
    assert "\n" not in str(error.value)


def test_a_storm_of_good_and_bad_requests_is_answered_right(served):
    asks = [getattr(client, name)(served[name], "encoder", 600) for name in ("rest", "grpc")]
    figures = server.storm(asks, client.local(served["models"] / "encoder"), number=80, clients=8)
    assert (figures["requests"], figures["right"]) == (80, 80)


def test_asking_the_other_protocols_port_ends_in_a_line(served):
    with pytest.raises(ConfigError, match="does not answer as TF Serving's REST does"):
        client.rest(served["grpc"], "encoder", 60)([b"x"])


@needs_api
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_silent_server_and_none_end_in_a_line(protocol, tmp_path):
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        silent.listen()
        address = f"localhost:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"took more than 0.3 s: raise --timeout|no server answers"):
            getattr(client, protocol)(address, "encoder", 0.3)([b"x"])
        assert time.monotonic() - start < 20
    with pytest.raises(ConfigError, match=f"no server answers at localhost:{(port := free_port())}"):
        getattr(client, protocol)(f"localhost:{port}", "encoder", 20)([b"x"])


def test_the_client_over_rest_needs_no_tensorflow():
    code = "import sys, export.client; sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras', 'grpc')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@needs_api
def test_models_config_is_what_the_server_reads():
    from tensorflow_serving.config import model_server_config_pb2

    text = (SERVING / "models.config").read_text()
    (config,) = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    assert (config.name, config.base_path, config.model_platform) == ("encoder", "MODELS/encoder", "tensorflow")
    served = set(config.model_version_policy.specific.versions)
    assert set(config.version_labels) == {"stable", "canary"} and set(config.version_labels.values()) <= served


def test_batching_config_is_what_the_server_reads():
    # BatchingParameters of session_bundle_config.proto, which no package brings.
    file = descriptor_pb2.FileDescriptorProto(
        name="batching.proto", package="p", syntax="proto3", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    message = file.message_type.add(name="BatchingParameters")
    names = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, name in enumerate(names, 1):
        message.field.add(name=name, number=number, type=11, label=1, type_name=".google.protobuf.Int64Value")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("p.BatchingParameters"))
    parsed = text_format.Parse((SERVING / "batching.config").read_text(), kind())
    assert all(getattr(parsed, name).value > 0 for name in names)


def test_the_start_script_refuses_what_is_no_folder(tmp_path):
    for arguments in ([], [str(tmp_path / "nothing")]):
        done = subprocess.run([SERVING / "serve.sh", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "give the folder that holds encoder/<version>/" in done.stderr


def test_a_search_path_for_cd_leads_the_start_script_nowhere(start, tmp_path):
    (tmp_path / "serving").symlink_to(SERVING)  # called by a relative path, which `cd` would look up
    status, words, says = start(tmp_path, script="serving/serve.sh", CDPATH=".")
    assert status == 0 and words[:3] == ["docker", "run", "--rm"], says


@pytest.fixture
def start(tmp_path):
    """Runs serve.sh where the commands named are the only ones that could serve: its status, their words, stderr."""

    def run(models, *arguments, commands=("docker",), script=SERVING / "serve.sh", **variables):
        programs = tmp_path / f"bin {len(list(tmp_path.iterdir()))}"
        programs.mkdir()
        for name in ("bash", "dirname", "mv"):
            (programs / name).symlink_to(shutil.which(name))
        for name in commands:
            (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@"\n')
            (programs / name).chmod(0o755)
        done = subprocess.run(
            [programs / "bash", script, models, *arguments],
            env={"PATH": str(programs)} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.split("\0")[:-1], done.stderr

    return run


def test_docker_publishes_a_pinned_image_to_this_machine_alone_unless_told_otherwise(start, tmp_path):
    both = ("docker", "tensorflow_model_server")
    for variables, host, image in (
        ({}, "127.0.0.1", r"tensorflow/serving:\d+\.\d+\.\d+"),
        ({"HOST": "10.0.0.7", "IMAGE": "mine:1"}, "10.0.0.7", "mine:1"),
        ({"HOST": "::1"}, "[::1]", ".*"),
    ):
        status, words, _ = start(tmp_path, "--tensorflow_inter_op_parallelism=2", commands=both, **variables)
        assert status == 0 and words[:3] == ["docker", "run", "--rm"]
        published = [word for flag, word in itertools.pairwise(words) if flag == "--publish"]
        assert published == [f"{host}:8500:8500", f"{host}:8501:8501"]
        at = words.index("--entrypoint")
        assert words[at + 1] == "tensorflow_model_server" and re.fullmatch(image, words[at + 2])
        assert words[at + 3 :] == [
            "--port=8500", "--rest_api_port=8501", f"--model_config_file={tmp_path}/models.config",
            "--model_config_file_poll_wait_seconds=60", "--allow_version_labels_for_unavailable_models=true",
            f"--grpc_channel_arguments=grpc.max_receive_message_length={256 << 20}",
            "--tensorflow_inter_op_parallelism=2",
        ]  # fmt: skip


def test_the_server_which_listens_on_all_addresses_is_run_only_where_that_is_asked_for(start, tmp_path):
    native = ("tensorflow_model_server",)
    for variables in ({}, {"HOST": "localhost"}, {"HOST": "10.0.0.7", "GRPC_PORT": "0"}):
        status, words, says = start(tmp_path, commands=native, **variables)
        assert (status, words) == (2, []) and says.count("\n") == 1
        assert f"cannot be kept to HOST={variables.get('HOST', '127.0.0.1')}" in says and "HOST=0.0.0.0" in says
    status, words, _ = start(tmp_path, commands=("docker", *native), HOST="0.0.0.0", BATCHING="1", MESSAGE_MB="8")
    assert status == 0 and words[:3] == ["tensorflow_model_server", "--port=8500", "--rest_api_port=8501"]
    assert f"--batching_parameters_file={tmp_path}/batching.config" in words
    assert f"--grpc_channel_arguments=grpc.max_receive_message_length={8 << 20}" in words
    by_file = {"GRPC_PORT": "0", "REST_PORT": "0"}
    status, words, _ = start(tmp_path, "--grpc_socket_path=x", commands=native, **by_file)
    assert status == 0 and words[1:3] == ["--port=0", "--rest_api_port=0"] and words[-1] == "--grpc_socket_path=x"
    status, _, says = start(tmp_path, commands=())
    assert status == 1 and "neither tensorflow_model_server nor docker" in says
    for wrong in ("0", "2048", "1 + 1", "much"):
        status, words, says = start(tmp_path, MESSAGE_MB=wrong)
        assert (status, words) == (2, []) and f"from 1 to 2047; got '{wrong}'" in says


@needs_api
@pytest.mark.parametrize(
    "name",
    ["my models", "a & b", "\\&", 'c"d,e:f', "it's", "$HOME `id`", "-n", "-", "line\nline\n", "back\\slash\\", "ä"],
)
def test_a_folder_of_any_name_is_served(start, tmp_path, name):
    from tensorflow_serving.config import model_server_config_pb2

    folder = tmp_path / "of/models" / name
    folder.mkdir(parents=True)
    (tmp_path / name).symlink_to(folder)
    for given, models in ((folder, folder), (name, tmp_path / name)):
        status, words, says = start(given)
        assert status == 0, says
        text = (folder / "models.config").read_text()
        (config,) = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
        assert config.base_path == f"{models}/encoder"
        assert f"--model_config_file={models}/models.config" in words
        ((*_, source, target),) = csv.reader([words[words.index("--mount") + 1]])
        assert (source, target) == (f"source={models}", f"target={models}")
        assert sorted(path.name for path in folder.iterdir()) == ["batching.config", "models.config"]
        (folder / "models.config").unlink()


def test_a_probes_folder_becomes_a_classifier(run_dir, tmp_path, capsys):
    probe = tmp_path / "probe"
    probe.mkdir()
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(32, 3)).astype("float32"), rng.normal(size=3).astype("float32")
    np.savez(probe / "probe.npz", kernel=kernel, bias=bias)
    (probe / "summary.json").write_text(json.dumps({"class_names": ["ant", "bee", "cow"], "encoder": "runs/x"}))
    arguments = [f"--run_dir={run_dir}", f"--output={tmp_path}/models/classifier"]
    assert export_classifier.main([*arguments, f"--probe={probe}"]) == 0
    path = tmp_path / "models/classifier/1"
    assert f"Wrote {path}." in capsys.readouterr().out
    images = rng.integers(0, 256, (3, 40, 36, 3), np.uint8)
    found = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(images))
    logits = found["features"].numpy() @ kernel + bias
    assert found["label"].numpy().tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(found["probabilities"].numpy().sum(1), 1, rtol=1e-5)
    about = json.loads((path / "encoder.json").read_text())
    assert about["class_names"] == ["ant", "bee", "cow"] and about["recipe"]["arch"] == "resnet10"
    assert about["data"] == {"dataset": "embedded", "split": "train", "images": 10000} and about["steps"] == 0

    (probe / "summary.json").write_text(json.dumps({"class_names": ["ant", "bee", "cow"], "identity": "another"}))
    assert export_classifier.main([*arguments, f"--probe={probe}"]) == 2
    error = capsys.readouterr().err
    assert "was learnt on the features of another encoder, or" in error and error.count("\n") == 1
    identity = frozen.of_model(build.trained(run_dir)).identity
    (probe / "summary.json").write_text(json.dumps({"class_names": ["ant", "bee", "cow"], "identity": identity}))
    assert export_classifier.main([*arguments, f"--probe={probe}"]) == 0
    shutil.rmtree(path.parent / "2")

    np.savez(probe / "probe.npz", kernel=kernel[:7], bias=bias)
    assert export_classifier.main([*arguments, f"--probe={probe}"]) == 2
    assert "kernel is (32, classes) for this encoder; got (7, 3)" in capsys.readouterr().err
    (probe / "summary.json").write_text("{}")
    assert export_classifier.main([*arguments, f"--probe={probe}"]) == 2
    assert "is not a linear probe, as" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "main, arguments, line",
    [
        (export_encoder.main, [], "give --run_dir=RUN and --output=DIR"),
        (export_encoder.main, ["--run_dir={empty}", "--output=x"], "is not a run folder: it has no config.flags"),
        (export_encoder.main, ["--run_dir={run}", "--output=x", "--format=onnx"], "--output=NAME.onnx; got x"),
        (export_encoder.main, ["--run_dir={run}", "--output=x", "--version=-1"], "--version is 0 or more; got -1"),
        (export_classifier.main, ["--run_dir={run}", "--output=x"], "give --run_dir=RUN, --probe=PROBE"),
        (export_classifier.main, ["--run_dir={run}", "--output=x", "--probe={empty}"], "it has no probe.npz"),
        (export_client.main, ["--images={empty}"], "give --images=PATH, and --output=FILE.npz or --compare=DIR"),
        (export_client.main, ["--images={empty}", "--output=x.npz"], "holds no image"),
        (export_client.main, ["--images=x", "--output=x"], "--output names a .npz file; got x"),
        (export_client.main, ["--images=x", "--output=x.npz", "--timeout=0"], "--timeout is more than 0; got 0.0"),
    ],
)
def test_wrong_flags_end_in_one_line(main, arguments, line, run_dir, tmp_path, capsys):
    assert main([argument.format(run=run_dir, empty=tmp_path) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


HEAVY = ("tensorflow", "keras", "grpc")


def export(*arguments):
    """`python -m moco_tf.serving.export`: status, stdout, stderr, and whether it has loaded anything heavy."""
    code = f"""import sys
from moco_tf.serving import export
status = export.main(sys.argv[1:])
sys.exit(9 if any(name in sys.modules for name in {HEAVY}) else status)"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_help_without_a_word_lists_the_three_commands_and_after_a_word_its_flags():
    status, listed, _ = export("--help")
    assert status == 0
    for word, flag in (("encoder", "--format"), ("classifier", "--probe"), ("client", "--protocol")):
        line = f"python -m moco_tf.serving.export {word} --"
        assert line in listed
        status, helped, _ = export(word, "--help")
        assert status == 0 and line in helped and f"\n  {flag}: " in helped


def test_an_unknown_word_and_wrong_flags_of_a_word_end_in_one_line():
    for arguments, line in (
        (
            ["model", "--help"],
            "moco_tf.serving.export: the word before the flags is one of encoder, classifier, client",
        ),
        (["client", "--x=1"], "moco_tf.serving.export client: Unknown command line flag 'x'"),
        (["--run_dir=x"], "moco_tf.serving.export encoder: give --run_dir=RUN and --output=DIR"),
        ([], "moco_tf.serving.export encoder: give --run_dir=RUN and --output=DIR"),
    ):
        status, _, printed = export(*arguments)
        assert status == 2 and printed.startswith(line) and printed.count("\n") == 1


@pytest.mark.parametrize("main", [export_encoder.main, export_classifier.main, export_client.main])
def test_in_a_checkout_a_command_speaks_under_the_name_that_it_was_called_by(main, capsys):
    name = main.__module__
    assert main([]) == 2 and capsys.readouterr().err.startswith(f"{name}: give ")
    assert main(["--help"]) == 0 and f"python -m {name} --" in capsys.readouterr().out
