"""The embedded model: an in-process engine behind `dspy.LM`. It is no LLM.

It reads the prompt DSPy writes (labels, their descriptions, demonstrations) and answers with linear and
nearest-neighbour rules over TF-IDF features; fitted on examples, it carries a small weights file. It understands
nothing, writes no new sentence (text fields are sentences taken from the inputs), follows no instruction beyond
label descriptions, and knows only the words it was shown. It is here so that the whole road, from prompt to
gate, is real without a key or a network: better descriptions, demonstrations or data really score better.
"""

from agentkit.embedded.engine import EmbeddedEngine
from agentkit.embedded.fit import fit
from agentkit.embedded.weights import Weights

__all__ = ["EmbeddedEngine", "Weights", "fit"]
