"""Texts that a made-up model wrote, and the learner that learns from them."""

from pathlib import Path

import torch

from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.learner_config import LearnerConfig
from stepladder.workers.speculation.learning.lessons import Captured, Lesson

HIDDEN, VOCAB = 32, 101
CONFIG = LearnerConfig(inner=48, drafted=80, batch=48, steps=6, every=160, rate=3e-3, held_out=4)


def target_of(directory: Path) -> TargetVocabulary:
    return TargetVocabulary(ModelSpec.load(directory), directory)


def captured(target: TargetVocabulary, requests: range, way: int, domain: str = "", tokens: int = 20) -> list[Captured]:
    """The next state of the model is a function of the last one and of the token, another one for each `way`."""
    torch.manual_seed(way)
    net = RecurrentHead(HIDDEN, 16)
    for weight in (net.linear.weight, net.gate.weight, net.up.weight, net.down.weight):
        torch.nn.init.normal_(weight, std=0.25)
    dice = torch.Generator().manual_seed(way)
    everything, found = target.rows(torch.arange(VOCAB)), []
    state = torch.randn(len(requests), HIDDEN, generator=dice)
    written, states = [], []
    with torch.no_grad():
        for _ in range(tokens):
            states.append(state)
            written.append(torch.multinomial((state @ everything.T).softmax(-1), 1, generator=dice)[:, 0])
            state = 3 * net(state, target.embed(written[-1])).tanh()
    for row, request in enumerate(requests):
        columns = torch.stack(written, 1)[row], torch.stack(states, 1)[row].bfloat16()
        found.append(Captured(domain, request, Lesson(*columns, torch.zeros(tokens, dtype=torch.bool))))
    return found
