"""Read and write videos, and a data set of clips with captions, labels or vectors.

A video is a float tensor ``(C, F, H, W)`` in [0, 1] here; networks take [-1, 1]
(``2 * video - 1``).
"""

from fastvdm.video.check import VideoReport, check_folder, check_video
from fastvdm.video.conditions import read_captions, read_labels, read_vectors
from fastvdm.video.folder import VideoFolder
from fastvdm.video.index import VideoReadError
from fastvdm.video.listing import SUFFIXES, list_videos
from fastvdm.video.pixels import resize_crop
from fastvdm.video.reader import count_frames, read_video, video_fps
from fastvdm.video.writer import OUTPUTS, check_output, grid, write_video

__all__ = [
    "OUTPUTS",
    "SUFFIXES",
    "VideoFolder",
    "VideoReadError",
    "VideoReport",
    "check_folder",
    "check_output",
    "check_video",
    "count_frames",
    "grid",
    "list_videos",
    "read_captions",
    "read_labels",
    "read_vectors",
    "read_video",
    "resize_crop",
    "video_fps",
    "write_video",
]
