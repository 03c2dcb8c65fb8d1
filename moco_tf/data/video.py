"""Takes frames of a video file at even times; PyAV decodes them one by one, and two are held at a time, never a video.

PyAV comes with the extra `video`. The command `moco_tf.data.frames` uses this module.
"""

import math
from fractions import Fraction

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"),
    *(".ts", ".mts", ".m2ts"),
)
SHORT = 1  # seconds by which pictures may end before the header says, such as where the sound is longer


class Unusable(Exception):
    """Raised for a file that gives no frames; the message is the reason."""


def sampled(path, fps, faults):
    """Yields the frame nearest to each multiple of 1/fps by presentation time, each once; `image` converts a frame.

    Time is counted from the first frame. If two frames are at the same distance, the earlier one is taken. The
    last frame stands for the time after it, up to half of its distance from the frame before.

    Args:
      path: an absolute path, so that FFmpeg sees no protocol in it, as it would in `a:b.mp4`.
      fps: a Fraction.
      faults: a list that gets sentences on the parts of the file that could not be read.

    Raises:
      Unusable: no frame can be decoded.
    """
    import av

    try:
        # A playlist called .mp4 could make FFmpeg look at addresses.
        container = av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise Unusable(error.strerror) from None
    with container:
        stream = _pictures(container)
        last = seen = 0
        for time, is_nearest, frame in _nearest(_timed(_decoded(container, stream, faults), stream), fps):
            last, seen = time, seen + 1
            if is_nearest:
                yield frame
        if not seen:
            raise Unusable(faults[-1] if faults else "no frame in it can be decoded")
        begin, end = _announced(container, stream)
        if max(last, last + begin) + SHORT < end:
            faults.append(f"the pictures end after {float(last):.1f} s of {float(end):.1f}")


def image(frame):
    """Converts a frame to a Pillow image in RGB, turned as the video says to show it."""
    turns = round(frame.rotation / 90)  # counterclockwise, for PyAV and Pillow
    return frame.to_image().rotate(90 * turns, expand=True)


def _pictures(container):
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a record
            if stream.codec_context is None:
                raise Unusable("FFmpeg has no decoder for its pictures")
            stream.thread_type = "AUTO"  # on all processors
            return stream
    raise Unusable("sound only, no pictures" if container.streams.audio else "no pictures in it")


def _announced(container, stream):
    """(begin, end) of the pictures in seconds, as the file's header has it; zeros where the header does not tell."""
    begin = Fraction(stream.start_time or 0) * stream.time_base
    if stream.duration:
        return begin, stream.duration * stream.time_base
    return begin, Fraction(container.duration or 0, 1_000_000)


def _decoded(container, stream, faults):
    """Yields the frames that can be decoded whole, in the order of presentation; goes on after those that cannot."""
    import av

    lost, packets = 0, container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            faults.append(f"reading ends early: {error.strerror}")
            packet = None
        try:
            frames = stream.decode(packet)  # None asks for those that wait inside the decoder
        except av.FFmpegError as error:
            if not isinstance(error, EOFError):  # it was asked before
                lost += 1
            frames = []
        for frame in frames:
            if frame.is_corrupt:  # the decoder has filled in what was missing
                lost += 1
            else:
                yield frame
        if packet is None:
            break
    if lost:
        faults.append(f"{lost} frames cannot be decoded")


def _timed(frames, stream):
    """Yields (time, frame), the time in seconds after the first frame, as a Fraction that never falls."""
    step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)  # where a frame does not tell its time
    start = previous = None
    shift = Fraction(0)
    for frame in frames:
        stamp = frame.dts if frame.pts is None else frame.pts
        time = shift if previous is None else previous + step
        if stamp is not None:
            time = stamp * frame.time_base + shift
        if start is None:
            start = time
        elif time < previous:  # the clock was set back, as where recordings are joined
            shift += previous + step - time
            time = previous + step
        previous = time
        yield time - start, frame


def _nearest(timed, fps):
    """Yields (time, whether it is the nearest frame to a multiple of 1/fps, frame)."""
    # A frame is the nearest from the middle between it and the frame before to the middle between it and the next.
    after = -1  # the first frame's time, 0, is a multiple
    gap = Fraction(0)
    held = None
    for time, frame in timed:
        if held:
            gap = time - held[0]
            until = held[0] + gap / 2
            yield held[0], _has_multiple(after, until, fps), held[1]
            after = until
        held = time, frame
    if held:
        yield held[0], _has_multiple(after, held[0] + gap / 2, fps), held[1]


def _has_multiple(after, until, fps):
    """Whether a multiple of 1/fps is more than `after` and at most `until`."""
    return math.floor(until * fps) > math.floor(after * fps)
