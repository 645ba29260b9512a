"""Looking at an engine: the flight recorder, its replay, traces and pictures, live views, and the log lines of trouble.

engine.save_recording("run.recording")
recording = observe.Recording.load("run.recording")
observe.Replay(recording).run()          # None, or the first step that is decided otherwise today
observe.draw_pool(recording)             # a matplotlib figure
"""

from __future__ import annotations

from jaxpaged.observe.picture import draw_pool
from jaxpaged.observe.recorder import Recorder
from jaxpaged.observe.recording import Recording
from jaxpaged.observe.records import RecordingError
from jaxpaged.observe.replay import Difference, Replay
from jaxpaged.observe.snapshot import snapshot
from jaxpaged.observe.trace import save_trace

__all__ = ["Difference", "Recorder", "Recording", "RecordingError", "Replay", "draw_pool", "save_trace", "snapshot"]
