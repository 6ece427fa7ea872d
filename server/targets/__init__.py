"""Targets: what answers a server's requests.

target.py has what every target offers. bundle.py is our own networks, openai.py another server with an API like
OpenAI's, vllm.py one that also verifies drafts and takes features, huggingface_target.py a model of transformers in
this process. Torch is only imported by bundle.py, for transformers and for features (features.py), so that a server
that sends pictures to another server needs none.
"""

from server.targets.target import Abilities, Answer, FeaturesError, Limits, PictureJob, Target, picture_job

__all__ = ["Abilities", "Answer", "FeaturesError", "Limits", "PictureJob", "Target", "picture_job"]
