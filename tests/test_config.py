"""Flags: each refusal is one line with the rule, the value and the way out; a recipe is whole."""

import codecs
import dataclasses
import os
import sys
from pathlib import Path

import pytest
from absl import flags

from moco_tf import command, files, run_folder, torch_weights
from moco_tf import config as config_lib
from moco_tf.command import ConfigError, HelpAsked
from moco_tf.config import kind, parse
from moco_tf.evaluate import compare, features, finetune, knn, linear_probe, look
from moco_tf.evaluate import settings as evaluation
from moco_tf.serving import export_classifier, export_client, export_encoder
from moco_tf.transfer import detect, segment
from moco_tf.transfer import export as transfer_export

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate=1"], "Unknown command line flag 'lerning_rate'"),
        (["--arch=resnet51"], "--arch=resnet51: value should be one of"),
        (["--batch_size=many"], "--batch_size"),
        (["--batch_size=0"], "--batch_size is more than 0; got 0"),
        (["--temperature=-1"], "--temperature is more than 0; got -1"),
        (
            ["--method=moco_v3", "--pretext=cpc"],
            "--pretext=cpc has a model of its own, in which no --method has a part",
        ),
        (["--method=memory_bank", "--bank_momentum=-1"], "--bank_momentum lies between 0 and 1; got -1"),
        (["--loss=nce"], "--loss=nce: value should be one of <infonce|supcon|supcon_in>"),
        (["--method=memory_bank", "--loss=nt_xent"], "--loss=nt_xent: value should be one of <infonce|nce>"),
        (["--momentum=1.5"], "--momentum lies between 0 and 1; got 1.5"),
        (["--bn_groups=8", "--batch_size=20"], "--batch_size=20 does not: choose a multiple of 8 from 16 up"),
        (["--bn_groups=8", "--batch_size=8"], "at least 2"),
        (["--lr_drops=160,120"], "--lr_drops lists epochs from 0 up in ascending order"),
        (["--lr_drops=a"], "--lr_drops lists whole numbers"),
        (["--lr_drops=-1,5"], "--lr_drops lists epochs from 0 up"),
        (["--warmup_epochs=200"], "--warmup_epochs=200 leaves nothing of --epochs=200"),
        (["--lr=inf"], "--lr is a finite number; got inf"),
        (["--temperature=nan"], "--temperature is a finite number; got nan"),
        (["--arch=resnext50", "--width=24"], "--width is a multiple of 16"),
        (["--flagfile="], "--flagfile=FILE names the file after an equals sign; got '--flagfile='"),
        (["--flagfile", "x.flags"], "--flagfile=FILE names the file after an equals sign"),
        (["--lr=1", "--flagfile=x.flags"], "--flagfile comes first: it would override '--lr=1'"),
        (["--seed=-1"], "--seed is 0 or more; got -1"),
        (["--decode=fast", "--views_on=device"], "--decode is exact with --views_on=device, which keeps whole images"),
        (
            ["--xla=on", "--method=memory_bank"],
            "XLA has no way to draw a memory bank's negatives: --xla is auto or off",
        ),
        (["--strategy=single", "--virtual_replicas=2"], "--virtual_replicas=2 divides one machine's CPU"),
        (["--flagfile=missing.flags"], "--flagfile=missing.flags: cannot be read: No such file or directory"),
        (["--flagfile=."], "--flagfile=.: cannot be read: Is a directory"),
        (["--dataset=a\nb"], "--dataset has no line break and neither begins nor ends with a blank"),
        (["--start_from=a\nb"], "--start_from has no line break and neither begins nor ends with a blank"),
        (["--data_dir=a "], "--data_dir has no line break and neither begins nor ends with a blank"),
        (["extra"], "all arguments are flags, --name=value; got 'extra'"),
        (["--loss=supcon"], "--loss=supcon is of several positives of a query; got --positives_from=keys: take batch"),
        (["--mask_siblings", "--positives_from=batch"], "makes no negatives of a query's own thing, with or without"),
        (["--token_dropout=0.5", "--method=moco_v3"], "--arch=resnet50 has none; got 0.5: leave it out"),
        (["--token_dropout=1", "--method=moco_v3"], "--token_dropout is a share, from 0 to less than 1; got 1"),
        (["--small_views=2", "--arch=vit_tiny"], "--small_views are smaller images, and vit_tiny takes one size"),
        (["--small_views=-1"], "--small_views is 0 or more; got -1"),
        (["--small_crop_max=0.01"], "--small_crop_max lies between 0.05 and 1; got 0.01"),
        (
            ["--method=memory_bank", "--small_views=2"],
            "--small_views sets further views, which a memory bank does not use",
        ),
        (
            ["--method=memory_bank", "--positives=2"],
            "--positives sets further views, which a memory bank does not use",
        ),
        (["--pretext=patches", "--image_size=17"], "--growing_sizes are even; got 17"),
        (["--pretext=patches", "--small_views=1"], "--pretext=patches encodes quarters of a view by a ResNet"),
        (["--growing_sizes=96", "--arch=vit_tiny"], "--growing_sizes changes the size of views, and vit_tiny takes"),
        (["--growing_sizes=0"], "--growing_sizes lists sizes above 0; got"),
        (["--growing_sizes=8,9", "--epochs=2", "--warmup_epochs=0"], "got 2 sizes and --epochs=2"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as refusal:
        parse(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_help_names_every_flag():
    with pytest.raises(HelpAsked) as help:
        parse(["--help"])
    for name in (field.name for field in command.fields(kind())):
        assert f"  --{name}: " in str(help.value) or f"  --[no]{name}: " in str(help.value)


def test_help_says_the_choices_once():
    with pytest.raises(command.HelpAsked) as help:
        command.parse(finetune.Settings, "a command", ["--help"])
    assert str(help.value).count("<encoder|random>") == 1


def test_help_has_titled_groups_with_the_methods_and_the_tasks_own_flags():
    with pytest.raises(HelpAsked) as help:
        parse(["--method=memory_bank", "--help"])
    titles = [line for line in str(help.value).splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:2] == ["What is learnt:", "The images:"]
    assert titles[-2:] == ["--method=memory_bank:", "--pretext=crops:"]
    _, _, own = str(help.value).partition("--method=memory_bank:")
    assert "--bank_momentum" in own and "--symmetric" not in str(help.value)


def test_a_flag_file_written_by_a_config_repeats_it(tmp_path):
    config = parse(["--arch=resnet18", "--noshuffle_bn", "--lr_drops=3,5", "--lr=1e-05", "--seed=9"])
    (tmp_path / "config.flags").write_text(config.flag_lines())
    assert "run_dir" not in config.flag_lines() and "--resume" not in config.flag_lines()
    again = config_lib.read(tmp_path / "config.flags")
    assert again.flag_lines() == config.flag_lines()
    assert not config.differences(again)


OF_EVALUATION = {"encoder", "dataset", "data_dir", "output"}
PATHS = {
    kind(): {"dataset", "data_dir", "run_dir", "start_from"},
    torch_weights.Settings: {"checkpoint", "encoder", "output"},
    compare.Settings: OF_EVALUATION | {"supervised"},
    features.Settings: OF_EVALUATION,
    finetune.Settings: OF_EVALUATION,
    knn.Settings: OF_EVALUATION,
    linear_probe.Settings: OF_EVALUATION,
    look.Settings: OF_EVALUATION,
    export_encoder.Settings: {"run_dir", "output", "calibrate"},
    export_classifier.Settings: {"run_dir", "probe", "output"},
    export_client.Settings: {"images", "output", "compare"},
    detect.Settings: OF_EVALUATION | {"init"},
    segment.Settings: OF_EVALUATION | {"init"},
    transfer_export.Settings: {"run_dir", "output"},
}


@pytest.mark.parametrize("kind", PATHS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_a_tilde_is_the_home_folder_in_every_flag_that_is_a_path(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = {field.name for field in dataclasses.fields(kind) if isinstance(field.default, str)}
    values = flags.FlagValues()
    command.define(values, command.fields(kind))
    texts -= {name for name in texts if values[name].parser.__class__ is flags.EnumParser}
    command.read_arguments(values, "a command", [f"--{name}=~/a/b" for name in texts])
    assert {name for name in texts if values[name].value == f"{tmp_path}/a/b"} == PATHS[kind]
    assert {values[name].value for name in texts - PATHS[kind]} <= {"~/a/b"}
    command.read_arguments(values, "a command", [f"--{name}=a/~" for name in texts])
    assert {values[name].value for name in texts} == {"a/~"}


def test_a_tilde_in_a_flag_file_its_name_and_an_old_run_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.flags").write_text("--dataset=~/photos\n")
    whole = parse(["--flagfile=~/config.flags"])
    assert (whole.dataset, whole.run_dir) == (f"{tmp_path}/photos", "runs/config")
    assert not parse([f"--dataset={tmp_path}/photos"]).differences(run_folder.recorded(tmp_path))


def test_a_folder_that_is_called_tilde_can_be_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    Path("~/config.flags").write_text("--seed=7\n")
    assert parse(["--run_dir=./~"]).run_dir == "./~" and run_folder.recorded("./~").seed == 7


@pytest.mark.parametrize(
    "encoding, mark",
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_flag_file_is_read_whatever_editor_has_written_it(tmp_path, encoding, mark, end):
    lines = ["--seed=7", "# --seed=8", "// --seed=9", "", "  ", "--dataset=/фото/m ü\x85\u2028n ", "--noresume", ""]
    (tmp_path / "a.flags").write_bytes(mark + end.join(lines).encode(encoding))
    config = parse([f"--flagfile={tmp_path / 'a.flags'}", "--run_dir=r"])
    assert (config.seed, config.dataset, config.resume, config.run_dir) == (7, "/фото/m ü\x85\u2028n", False, "r")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"--lerning_rate=1\n", "Unknown command line flag 'lerning_rate'"),
        (b"--seed=x\n", "--seed=x"),
        (b"word\n", "all arguments are flags, --name=value; got 'word'"),
        (
            b"--seed=1\n--flagfile=b.flags\n",
            "a flag file holds flags and names no other one; got '--flagfile=b.flags'",
        ),
        (b"-flagfile=b.flags\n", "a flag file holds flags and names no other one; got '-flagfile=b.flags'"),
        (b"  --flagfile\nb.flags\n", "a flag file holds flags and names no other one; got '--flagfile'"),
        (b"---flagfile=b.flags\n", "a flag file holds flags and names no other one; got '---flagfile=b.flags'"),
        (codecs.BOM_UTF16_LE + b"-", "begins as UTF-16 and is none: save it as UTF-8"),
    ],
)
def test_what_is_wrong_in_a_flag_file_is_said_in_one_line_with_its_name(tmp_path, content, message):
    (tmp_path / "a.flags").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        parse([f"--flagfile={tmp_path / 'a.flags'}"])
    assert f"--flagfile={tmp_path / 'a.flags'}: " in str(refusal.value) and message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_paths_that_are_no_text_go_through_a_flag_file_byte_for_byte(tmp_path):
    name = os.fsdecode(bytes(range(0x20, 0x7F)) + b"m\xfcnchen\x85\xa0\xe2\x80").strip()
    config = parse([f"--dataset={name}", f"--data_dir={name}"])
    file = tmp_path / os.fsdecode(b"\xff.flags")
    files.write_text(file, config.flag_lines(), errors="surrogateescape")
    again = config_lib.read(file)
    assert os.fsencode(again.dataset) == os.fsencode(again.data_dir) == os.fsencode(name)
    assert not config.differences(again)


def test_the_run_folder_is_named_after_the_flag_file():
    assert parse([f"--flagfile={CONFIGS / 'v1.flags'}"]).run_dir == "runs/v1"
    assert parse([f"--flagfile={CONFIGS / 'v1.flags'}", "--run_dir=x"]).run_dir == "x"


def test_only_mathematics_must_be_equal_on_resume():
    a = parse(["--epochs=5", "--checkpoint_every=3", "--knn_every=0", "--lr=0.1", "--seed=3"])
    assert sorted(a.differences(parse([]))) == ["lr", "seed"]


OF_OTHER_COMMANDS = {  # what a recipe's name says: its command, settings, and the flags that it leaves open
    "linear_": ("moco_tf.evaluate.linear_probe", linear_probe.Settings, ["--encoder=x"]),
    "_detect": ("moco_tf.transfer.detect", detect.Settings, ["--encoder=x", "--dataset=y"]),
    "_segment": ("moco_tf.transfer.segment", segment.Settings, ["--encoder=x", "--dataset=y"]),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.flags")), ids=lambda path: path.stem)
def test_each_recipe_parses_and_opens_with_a_lab_record(path):
    name, parse_with, more = next(
        (how for word, how in OF_OTHER_COMMANDS.items() if word in path.stem), ("moco_tf.train", None, [])
    )
    words = [f"--flagfile={path}", *more]
    command.parse(parse_with, name, words) if parse_with else parse(words)
    text = path.read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"Command: python -m {name}" in line for line in head)
    assert any("Expected" in line or "Measured" in line for line in head)
    assert not any(line.startswith("--flagfile") for line in text.splitlines())


LINES = {"train": (kind(), "v1", []), "probe": (linear_probe.Settings, "linear_v1", ["--encoder=x"])}


@pytest.mark.parametrize("kind, name, more", LINES.values(), ids=LINES)
def test_a_recipe_that_is_not_here_is_the_packaged_one(kind, name, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in (f"configs/{name}.flags", f"./configs/{name}.flags"):
        packaged = command.parse(kind, "a command", [f"--flagfile={file}", *more])
        assert packaged == command.parse(kind, "a command", [f"--flagfile={CONFIGS}/{name}.flags", *more])
        assert capsys.readouterr().out == f"Recipe: {CONFIGS}/{name}.flags\n"


def test_a_recipe_in_the_current_folder_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/v1.flags").write_text("--seed=7\n")
    assert parse(["--flagfile=configs/v1.flags"]).seed == 7
    assert parse(["--flagfile=configs/v2.flags"]).head == "mlp"  # the folder alone hides no other
    assert capsys.readouterr().out == f"Recipe: {CONFIGS}/v2.flags\n"


def test_a_recipe_that_is_nowhere_is_refused_with_the_names_of_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        parse(["--flagfile=configs/v9.flags"])
    line = str(refusal.value)
    assert line.startswith("--flagfile=configs/v9.flags: is neither a file here nor a packaged recipe; those are ")
    assert line.partition(" are ")[2].split(", ") == [f"configs/{path.name}" for path in sorted(CONFIGS.iterdir())]


def test_only_recipes_are_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("v1.flags", f"{tmp_path}/configs/v1.flags", "more/configs/v1.flags", "configs/../configs/x/v1.flags"):
        with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
            parse([f"--flagfile={file}"])


def _settings(name):
    return {line for line in (CONFIGS / name).read_text().splitlines() if line.startswith("--")}


def test_v2_differs_from_v1_in_augmentation_head_temperature_and_schedule():
    v1, v2 = _settings("v1.flags"), _settings("v2.flags")
    assert v1 - v2 == {
        "--augment=v1",
        "--head=linear",
        "--temperature=0.07",
        "--lr_schedule=step",
        "--lr_drops=120,160",
    }
    assert v2 - v1 == {"--augment=v2", "--head=mlp", "--temperature=0.2", "--lr_schedule=cosine"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch_size=10"], "--batch_size counts the images of all 4 replicas, a multiple of 4; got 10"),
        (["--bn_groups=2"], "--bn_groups counts the groups of all replicas, a multiple of 4; got 2"),
        (["--precision=float16"], "--precision=float16 scales its loss on one replica only; use bfloat16"),
    ],
)
def test_what_replicas_cannot_share_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments).on_replicas(4)


def test_bn_groups_are_what_the_run_began_with_and_else_one_a_replica():
    begun = parse([]).on_replicas(4)
    assert begun.bn_groups == 4
    assert parse([]).on_replicas(2, begun).bn_groups == 4
    assert parse(["--bn_groups=8"]).on_replicas(2).bn_groups == 8
    assert not begun.differences(parse([]).on_replicas(1, begun))


def test_groups_of_a_run_of_another_method_are_not_asked_for():
    assert parse([]).on_replicas(2, parse(["--method=moco_v3"])).bn_groups == 2  # the run folder refuses what differs


def test_what_the_flags_of_anothers_run_lead_to_is_shown_before_it_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_stranger.py").write_text("print('It runs.')\n")
    command.log_to_screen()
    for flag in ("pretext", "method"):
        (tmp_path / "config.flags").write_text(f"--{flag}=of_a_stranger\n")
        with pytest.raises(ConfigError, match="lacks one"):
            run_folder.recorded(tmp_path)
        shown, ran = capsys.readouterr().out.splitlines()
        assert (shown, ran) == (f"--{flag} imports the module of_a_stranger from the Python path.", "It runs.")
        del sys.modules["of_a_stranger"]
    (tmp_path / "config.flags").write_text("--pretext=no_such_module\n")
    with pytest.raises(ConfigError, match="got 'no_such_module'"):
        run_folder.recorded(tmp_path)
    (tmp_path / "config.flags").write_text("--dataset=her\x1b[2J photos\n--data_dir=/home/her\n")
    settings = evaluation.Settings(encoder=str(tmp_path))
    assert settings.resolved().data_dir == "/home/her"
    shown = capsys.readouterr().out
    assert shown == f"Images: her\\x1b[2J photos in /home/her, as {tmp_path}/config.flags says.\n"
    dataclasses.replace(settings, dataset="mine").resolved()
    assert capsys.readouterr().out == ""
