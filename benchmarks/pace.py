"""What a paced worker takes for a step. It is known, and with it what any split gives."""

import numpy as np

SEQUENCES = (0, 1, 2, 4, 8, 16, 32, 64)
LAYER_S = (0.16e-3, 0.18e-3, 0.21e-3, 0.30e-3, 0.42e-3, 0.66e-3, 1.18e-3, 2.5e-3)
"""Of steps in which so many sequences compute one token each, with 96 positions before."""

PROMPT_TOKEN_S = 6.5e-6
TASK_S = 0.5e-3
HEAD_S = 0.1e-3
SAMPLE_S = 15e-6


class Pace:
    """What a worker of slowdown 1 takes for a step, seconds.

    Measured once on a core of an AMD EPYC, with layers of hidden size 128 in float32.

    Args:
        layers: of the worker.
        last: it has the last layer, and so the head.
        answering: sequences that compute one token each.
        prompt_tokens: of the parts of prompts in the step.

    Attributes:
        layers_s: inside the layers.
        task_s: in all.
    """

    def __init__(self, *, layers: int, last: bool, answering: float, prompt_tokens: float) -> None:
        layer_s = float(np.interp(answering, SEQUENCES, LAYER_S)) + prompt_tokens * PROMPT_TOKEN_S
        self.layers_s = layers * layer_s
        head_s = HEAD_S + answering * SAMPLE_S if last else 0.0
        self.task_s = self.layers_s + TASK_S + head_s
