"""Clusters answer what transformers answers, whatever happens to their answers meanwhile.

For each kind of model, greedy and sampled answers run in one simulated cluster whose workers
compute. Its room is too small for all of them, so some are preempted; their layers move to other
workers with their KV cache and, where workers cannot reach each other, without it; and a worker is
killed in a task. `make chaos` does that to every type of model, at other moments each time.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from distributed_llm.common.messages import DrainWorker, Finished, TaskFailed, WorkerDrained
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.serving.event_log import EventKind
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.encoder_decoders import SETTINGS, build
from tests.model.drawn_answers import Expected, Told, answers_of_transformers
from tests.model.engine_worker import EngineWorker, EngineWorld
from tests.model.test_families import NUM_LAYERS, VARIANTS
from tests.unit.fake_client import Answer
from tests.wholes import WHOLES, build_whole

PROMPT_TOKENS = 124
"""Four fewer than two blocks of KV cache: answers soon need a third one."""
LEAST_TOKEN = 4
"""Others are special in some models: M2M100 does not count padding within a text."""
NEW_TOKENS = 24
SHARED = ((1, 0, 70), (3, 2, 100))
"""Which prompt begins like which other one, for how many tokens."""
BLOCKS, STATES, STATES_ALONE = 6, 10, 6
"""What there is room for: one or two answers less than there are; states where there is no more."""

GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0, logprobs=0)
REQUESTS = (
    (0, GREEDY),
    (1, replace(GREEDY, temperature=0.9, top_k=0, top_p=0.9, seed=5, n=2)),
    (1, GREEDY),
    (2, replace(GREEDY, temperature=1.5, top_k=40, top_p=1.0, frequency_penalty=0.2, seed=2**62)),
    (2, GREEDY),
    (3, GREEDY),
)
"""Which prompt each request has, and how it is answered; in the order in which they come."""
ALL_TOKENS = NEW_TOKENS * sum(params.n for _, params in REQUESTS)

_MOST_SCENES = 12
"""How often other moments are drawn where not all has happened at those before."""

REPRESENTATIVES = {
    "llama": "plain layers",
    "gemma2": "windows in some layers",
    "bloom": "ALiBi",
    "deepseek_v3": "latents, and experts",
    "gemma4-shared": "layers that read the keys and values of others",
    "qwen3_next": "states in some layers, and experts",
    "mamba2": "states alone",
    "whole qwen2_5_vl": "the text part of a model for pictures",
    "stacks umt5": "an encoder and a decoder",
}
"""One of each kind, for every run of the suite."""

_EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    **VARIANTS,
    "gemma3n-shared": ("gemma3n_text", {"num_layers": 6, "num_kv_shared_layers": 3}),
    "gemma4-shared": ("gemma4_text", {"num_layers": 6, "num_kv_shared_layers": 3}),
}
EVERY = [
    *_EVERY,
    *(f"whole {name}" for name in WHOLES),
    *(f"stacks {name}" for name in SETTINGS),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try one model of each kind; with `--schedules` every type, at random moments."""
    if "name" in metafunc.fixturenames:
        many = metafunc.config.getoption("--schedules")
        metafunc.parametrize("name", EVERY if many else REPRESENTATIVES)


def make(name: str, folder: Path) -> Any:
    """Write a checkpoint; return the model of transformers."""
    if name.startswith("whole "):
        model: Any = build_whole(name.removeprefix("whole "))
        model.save_pretrained(folder)
        return model
    if name.startswith("stacks "):
        model = build(name.removeprefix("stacks "))
        model.save_pretrained(folder)
        return model
    family, settings = _EVERY[name]
    values: dict[str, Any] = {"num_layers": NUM_LAYERS.get(family, 4), **settings}
    make_checkpoint(folder, family, **values)
    values.pop("max_shard_size", None)
    return build_model(family, **values)


class Uneventful(AssertionError):
    """Not all that should has happened to the answers: that depends on when it does."""


def happens(what: object, text: str) -> None:
    """Assert that something has happened to the answers of a scene.

    Raises:
        Uneventful: it has not.
    """
    if not what:
        raise Uneventful(text)


class Scene:
    """One cluster, its answers, and what happens to them in turn.

    Args:
        folder: of the checkpoint.
        prompts: of the answers, in the order in which they come.
        draw: draws the moments, and to whom something happens.
    """

    def __init__(self, folder: Path, prompts: list[list[int]], draw: random.Random) -> None:
        self.draw = draw
        self.world = EngineWorld(folder, seed=draw.randrange(2**16), blocks=BLOCKS, states=STATES)
        if not any(self.world.cost.layer_kv_bytes):
            self.world.states = STATES_ALONE
        elif any(self.world.cost.layer_state_bytes):
            self.world.blocks += 2  # or nobody begins like another one that still runs
        for number in range(4):
            self.world.worker(f"w{number}")
        assert self.world.run(lambda: self.world.state == "serving", for_s=30.0)
        self.client = self.world.client()
        for number, params in REQUESTS:
            self.client.submit(prompts[number], params)

    def sampled(self) -> list[tuple[str, Answer]]:
        """Return the answers that are sampled, each with the name of its request."""
        answers = self.client.answers.items()
        return [(name, one) for name, answer in answers for one in answer.all if one.params.seed]

    def until(self, share: float) -> None:
        """Let time pass until this share of all tokens has come, or a little more.

        Answers that are sampled are written then.
        """
        tokens = round(ALL_TOKENS * (share + self.draw.uniform(0.0, 0.1)))
        assert self.world.run(lambda: self.world.tokens() >= tokens, for_s=60.0)
        written = [0 < len(answer.token_ids) < NEW_TOKENS for _, answer in self.sampled()]
        happens(any(written), "none of those that are sampled is being written")

    def is_still(self) -> bool:
        """Whether it serves, and no layers move."""
        return self.world.state == "serving" and self.world.core._moves.move is None

    @property
    def has_encoder(self) -> bool:
        """Whether some layers read what others answer."""
        return self.world.cost.encoder_layers > 0

    @property
    def serving(self) -> list[EngineWorker]:
        """The workers with layers."""
        return [worker for worker in self.world.plan() if isinstance(worker, EngineWorker)]

    def move(self) -> None:
        """Have layers change hands, the first one among them."""
        starts, before = [piece.start for piece in self.world.cost.pieces[1:]], self.world.epoch
        cuts = self.draw.sample(starts, k=self.draw.randint(1, min(3, len(starts))))
        fit = [worker.id for worker in self.world.core._registry.fit]
        first = fit.index(WorkerId(self.serving[0].worker_id))
        self.world.move(sorted(cuts), shift=first + self.draw.randint(1, 3))
        assert self.world.core._moves.move is not None
        assert self.world.run(self.is_still, for_s=30.0)
        assert self.world.epoch > before

    def drain(self) -> None:
        """Have one with layers leave; a copy of its KV cache fails first."""
        what = self.draw.choice(["fail_exports", "fail_imports", "fail_assemblies"])
        for worker in self.world.workers:
            setattr(worker, what, 1)
        leaving, told = self.draw.choice(self.serving), self.client.others
        self.client.say(DrainWorker(worker=leaving.worker_id))
        assert self.world.run(lambda: any(isinstance(m, WorkerDrained) for m in told), for_s=30.0)
        leaving.leave()
        assert self.world.run(self.is_still, for_s=30.0)

    def kill(self) -> None:
        """Kill one with layers in the middle of a task: the last, if others may have none.

        Encoders have none while answers are written.
        """
        victim = self.draw.choice(self.serving[-1:] if self.has_encoder else self.serving)
        victim.before_task = lambda task: victim.kill()
        assert self.world.run(lambda: victim.state == "dead", for_s=30.0)

    def end(self) -> None:
        """Wait for the end of all answers, and check that all of this did happen to them."""
        world = self.world
        assert world.run(world.all_ended, for_s=120.0)
        world.settle()
        world.check_drained()
        moves, totals = world.core._moves, world.core._book.totals
        happens(totals.preemptions, "none was preempted")
        stories = [self.world.core.story(request=name) for name, _ in self.sampled()]
        kinds = {entry.kind for story in stories for entry in story}
        assert world.counts["up", TaskFailed] == 0
        happens(EventKind.ANSWER_PREEMPTED in kinds, "none of those that are sampled was preempted")
        happens(totals.recovered, "none was computed again")
        happens(moves.num_moves == 2, "a move was undone")
        if not any(world.cost.layer_state_bytes):
            happens(moves.copied_bytes["faster"], "nothing was copied")
            happens(moves.begun["leaving"] == 2, "no copy failed")


def play(name: str, folder: Path, seed: int) -> int:
    """Have all that happens to the answers of one model, and check them.

    Returns:
        how many of those that are sampled part from what is expected, at near ties.
    """
    model = make(name, folder)
    size = (4, PROMPT_TOKENS)
    prompts = torch.randint(LEAST_TOKEN, VOCAB_SIZE - 1, size, generator=torch.manual_seed(3))
    for child, parent, length in SHARED:
        prompts[child, :length] = prompts[parent, :length]
    scene = Scene(folder, prompts.tolist(), random.Random(seed))
    scene.until(0.1)
    scene.move()
    scene.until(0.3)
    scene.drain()
    scene.until(0.6)
    scene.kill()
    scene.end()
    answers = [one for answer in scene.client.answers.values() for one in answer.all]
    assert [type(answer.end) for answer in answers] == [Finished] * len(answers)
    told = [Told(one.token_ids, [each.logprob for each in one.logprobs]) for one in answers]
    numbers = [number for number, params in REQUESTS for _ in range(params.n)]
    expected = answers_of_transformers(model, prompts[numbers], samplings(model), NEW_TOKENS)
    return expected.check(told)


def samplings(model: Any) -> list[Sampling]:
    """Return what each answer is sampled with, those of a request by the seeds that follow its own.

    What a decoder starts with, where there is an encoder, is a single token.
    """
    begins = 1 if model.config.is_encoder_decoder else PROMPT_TOKENS
    return [
        Sampling(
            temperature=params.temperature or 0.0,
            top_k=params.top_k or 0,
            top_p=params.top_p or 1.0,
            frequency_penalty=params.frequency_penalty,
            seed=(params.seed or 0) + choice,
            prompt_tokens=begins,
        )
        for _, params in REQUESTS
        for choice in range(params.n)
    ]


def test_answers_are_those_of_transformers(
    name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    many = pytestconfig.getoption("--schedules")
    for left in reversed(range(_MOST_SCENES if many else 1)):
        seed = random.randrange(2**48) if many else 0
        try:
            assert play(name, tmp_path / str(left), seed) <= (1 if many else 0)
            return
        except BaseException as exc:
            exc.add_note(f"in the scene of {name} with seed {seed}")
            if not (left and isinstance(exc, Uneventful)):
                raise


@pytest.mark.parametrize(
    ("temperature", "lead", "told", "parts"),
    [(1.0, 0.5, 1, 0), (1.0, 1e-4, 0, 1), (1.0, 1e-3, 0, None), (0.0, 1e-4, 0, None)],
)
def test_only_a_near_tie_of_a_draw_excuses_another_token(
    temperature: float, lead: float, told: int, parts: int | None
) -> None:
    sampling = Sampling(temperature=temperature, top_k=1, seed=5)
    logits = torch.tensor([0.0, lead, -3.0])
    expected = Expected(torch.tensor([[2, 0]]), torch.tensor([[1]]), logits[None, None], [sampling])
    answer = Told([told], [float(logits.log_softmax(-1)[told])])
    if parts is None:
        with pytest.raises(AssertionError, match="from 0 on"):
            expected.check([answer])
    else:
        assert expected.check([answer]) == parts
