"""Targets: what answers a server's requests.

target.py has what every target offers. bundle.py is our own networks, openai.py another server with an API like
OpenAI's, vllm.py one that also verifies drafts, huggingface_target.py a model of transformers in this process. Torch
is only imported by bundle.py and for transformers, so that a server whose target is another server needs none.
"""

from server.targets.target import Abilities, Answer, Limits, PictureJob, Target, picture_job

__all__ = ["Abilities", "Answer", "Limits", "PictureJob", "Target", "picture_job"]
