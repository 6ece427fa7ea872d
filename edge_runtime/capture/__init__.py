"""Where a board's frames come from: picture files, videos, live cameras and streams, pictures over MQTT.

readers.py reads one source once. camera.py opens it again after a failure and switches it on and off. cameras.py makes
one stream of all cameras. motion_gate.py decides which frames go on. picture_files.py reads directories and tars.
diagnosis.py finds out why a camera cannot be opened. A new kind of source is a new reader in readers.py.
"""

from edge_runtime.capture.camera import Camera, CameraState
from edge_runtime.capture.cameras import Cameras
from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.capture.readers import Counters, Frame

__all__ = ["Camera", "CameraState", "Cameras", "Counters", "Frame", "Picture", "read_pictures"]
