"""Where a board's frames come from: picture files, videos, live cameras and streams, pictures over MQTT.

readers.py chooses the reader of a source, which reads it once: files (readers.py, picture_files.py), live cameras
(live.py) by OpenCV, over HTTP (http_pictures.py) or by a program (child.py). camera.py opens it again after a failure
and switches it on and off; it keeps what remembers pictures: a watched folder, pictures over MQTT, Frigate's events
(frigate.py). cameras.py makes one stream of all cameras. motion_gate.py decides which frames go on. diagnosis.py finds
out why a camera cannot be opened. Sources and their keys are in edge_runtime/config/camera_source.py; docs/cameras.md
is for users.
"""

from edge_runtime.capture.camera import Camera, CameraState
from edge_runtime.capture.cameras import Cameras
from edge_runtime.capture.frame import Counters, Frame
from edge_runtime.capture.picture_files import Picture, read_pictures

__all__ = ["Camera", "CameraState", "Cameras", "Counters", "Frame", "Picture", "read_pictures"]
