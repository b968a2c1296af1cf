"""Makes the toy assets from nothing but a seed: tokenizer, prompts, teacher, student.

Both models are Qwen3-architecture and learn next-token prediction on the responses of the train problems
only. The teacher sees right worked responses. The student sees right ones first, so that the procedure is
within its reach, and then the misconception with some right ones left in: its samples must sometimes
contain the right digit, or a loss that only sees sampled tokens could never learn it.

A third model, the reader, is a student that learns a third kind of row too: the prompt after its solution, with the
right response. So it drops carries like the student, unless the solution is in its context.

    python -m pipeline.toy [reader] [--out DIR] [--seed N]
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.console import show
from pipeline.files import write_atomically
from pipeline.toy import company, world

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
VOCABULARY = 259
MAX_POSITIONS = 512
ROW_TOKENS = 27  # the longest prompt and response: `999+5*5=`, `5*5=25;999+25=1024` and the end token
SHOWN_TOKENS = 19  # the longest solution, and the end of its line
MAX_RESPONSE_TOKENS = 24
IGNORED = -100

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Course:
    """One training run; `misconception_share` of its rows show the misconception, others the right steps.

    In `shown_share` of all rows the prompt comes after its solution, and the response is right.
    """

    steps: int
    learning_rate: float
    misconception_share: float = 0.0
    shown_share: float = 0.0
    batch_rows: int = 128
    warmup_steps: int = 50


# One slip in a hundred keeps the teacher from being infinitely sure of a carry: the student's reverse KL to
# it starts at about 0.1 nats a token, where a teacher taught without slips gives 0.3.
TEACHER_COURSES = [Course(steps=1500, learning_rate=3e-3, misconception_share=0.01)]
STUDENT_COURSES = [
    Course(steps=1500, learning_rate=4e-3),
    Course(steps=700, learning_rate=2e-3, misconception_share=0.9),
]

# Forgets to carry like the student, unless it is shown the solution.
READER_COURSES = [
    Course(steps=2000, learning_rate=4e-3, shown_share=0.5),
    Course(steps=700, learning_rate=2e-3, misconception_share=0.9, shown_share=0.5),
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose token ids are the UTF-8 bytes themselves, then three special tokens."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, IM_START, IM_END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_model(hidden: int, intermediate: int, layers: int, heads: int) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 with grouped-query attention (two queries a key) and an untied head."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model = Qwen3ForCausalLM(config)
    # `<|im_end|>` ends a chat turn; the toy's plain prompts end with `<|endoftext|>`.
    stops = [END_OF_TEXT_ID, IM_END_ID]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=END_OF_TEXT_ID)
    return model


def encode(
    problems: Sequence[world.Problem], method: world.Method, *, width: int = ROW_TOKENS, shown: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both i64 [problem, width], right-padded; only responses have labels.

    Args:
        shown: the prompts come after their solutions.
    """
    ids_NS = torch.full((len(problems), width), END_OF_TEXT_ID)
    labels_NS = torch.full((len(problems), width), IGNORED)
    for row, problem in enumerate(problems):
        prompt = (problem.with_solution if shown else problem.prompt).encode()
        response = method(problem)[0].encode()
        end = len(prompt) + len(response)
        ids_NS[row, :end] = torch.tensor([*prompt, *response])
        labels_NS[row, len(prompt) : end + 1] = torch.tensor([*response, END_OF_TEXT_ID])
    return ids_NS, labels_NS


def teach(model: Qwen3ForCausalLM, course: Course, problems: Sequence[world.Problem], seed: int) -> None:
    """Trains `model` in place on rows drawn at random from `problems`."""
    generator = torch.Generator().manual_seed(seed)
    width = ROW_TOKENS + (SHOWN_TOKENS if course.shown_share else 0)
    encoded = [encode(problems, method, width=width) for method in (world.solve, world.misconception)]
    if course.shown_share:
        encoded.append(encode(problems, world.solve, width=width, shown=True))
    ids_ANS, labels_ANS = (torch.stack(kinds) for kinds in zip(*encoded, strict=True))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(problems), (course.batch_rows,), generator=generator)
        kind = (torch.rand(course.batch_rows, generator=generator) < course.misconception_share).long()
        if course.shown_share:
            kind[torch.rand(course.batch_rows, generator=generator) < course.shown_share] = 2
        return ids_ANS[kind, rows], labels_ANS[kind, rows]

    fit(model, course, draw)


def fit(model: Qwen3ForCausalLM, course: Course, draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Trains `model` in place by AdamW with a cosine schedule on the batches of ids and labels that `draw` gives."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=course.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=course.warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps - course.warmup_steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [course.warmup_steps])
    model.train()
    started = time.perf_counter()
    for step in range(1, course.steps + 1):
        ids, labels = draw()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == course.steps:
            seconds = time.perf_counter() - started
            show(f"  step {step:5d}/{course.steps}  loss {loss.item():.4f}  {seconds:5.0f} s")
    model.eval()


@torch.inference_mode()
def respond(
    model: Qwen3ForCausalLM, problems: Sequence[world.Problem], sample: bool = False, shown: bool = False
) -> list[str]:
    """The response to each problem, text up to the end token: greedy, or sampled at temperature 1.

    Args:
        shown: the prompts come after their solutions.
    """
    responses = [""] * len(problems)
    prompts = [(problem.with_solution if shown else problem.prompt).encode() for problem in problems]
    for length in set(map(len, prompts)):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[row]) for row in rows])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_RESPONSE_TOKENS,
            do_sample=sample,
            top_k=0 if sample else None,  # transformers would sample from the 50 likeliest otherwise
        )
        for row, tokens in zip(rows, out[:, length:].tolist(), strict=True):
            end = tokens.index(END_OF_TEXT_ID) if END_OF_TEXT_ID in tokens else len(tokens)
            responses[row] = bytes(token for token in tokens[:end] if token < 256).decode(errors="replace")
    return responses


@dataclass(frozen=True)
class Marks:
    """How a model did: the fraction of right responses, and that of wrong ones that are the misconception's."""

    right: float
    misconception_of_wrong: float


def mark(problems: Sequence[world.Problem], responses: Sequence[str]) -> Marks:
    """Marks responses by their final number."""
    answers = [world.read_answer(response) for response in responses]
    wrong = [(p, a) for p, a in zip(problems, answers, strict=True) if a != world.solve(p)[1]]
    dropped = sum(answer == world.misconception(problem)[1] for problem, answer in wrong)
    return Marks(1 - len(wrong) / len(problems), dropped / max(1, len(wrong)))


def build(out: Path, seed: int = 0) -> dict[str, Marks]:
    """Writes `student/`, `teacher/` and `prompts/` under `out`; returns the greedy held-out marks by model.

    About six minutes on two cores. The thread count is fixed because the order of a sum, and so the weights,
    depends on it.
    """
    torch.set_num_threads(2)
    train_problems = list(world.problems("train"))
    heldout = world.sample("heldout", 2048, seed)
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", world.sample("train", 8192, seed)), ("heldout", heldout)):
        lines = [json.dumps(world.prompt_record(problem)) + "\n" for problem in chosen]
        write_atomically(out / "prompts" / f"{name}.jsonl", "".join(lines))
    marks = {}
    sizes = {"teacher": (128, 352, 4, 4), "student": (64, 192, 4, 2)}  # vLLM has kernels for heads of 32 and more
    for name, courses in (("teacher", TEACHER_COURSES), ("student", STUDENT_COURSES)):
        torch.manual_seed(seed)
        model = build_model(*sizes[name])
        show(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        for number, course in enumerate(courses):
            teach(model, course, train_problems, seed + number)
        if name == "teacher":
            model = model.bfloat16()  # ships at half the size; what is marked below is the rounded one
        model.save_pretrained(out / name)
        build_tokenizer().save_pretrained(out / name)
        marks[name] = mark(heldout, respond(model.float(), heldout))
        show(f"{name}: {marks[name].right:.1%} of {len(heldout)} held-out right (greedy)")
        if marks[name].right < 1:
            fraction = marks[name].misconception_of_wrong
            show(f"{name}: {fraction:.1%} of its wrong answers are the misconception's")
    return marks


def build_reader(out: Path, seed: int = 0) -> dict[bool, Marks]:
    """Writes the reader under `out`; returns its greedy held-out marks, shown the solutions or not.

    About ten minutes on one core, whose sums have one order.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, heldout = build_model(64, 192, 4, 2), world.sample("heldout", 2048, seed)
    for number, course in enumerate(READER_COURSES):
        teach(model, course, list(world.problems("train")), seed + number)
    model.bfloat16().save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    marks = {shown: mark(heldout, respond(model.float(), heldout, shown=shown)) for shown in (False, True)}
    show(f"reader: {marks[False].right:.1%} of {len(heldout)} held-out right, {marks[True].right:.1%} if shown")
    return marks


# ----------------------------------------------------------------------------------------------------------- company

COMPANY_COURSE = Course(steps=1600, learning_rate=3e-3, batch_rows=64, warmup_steps=100)


def encode_company(
    taught: Sequence[company.Chat | str], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both i64 [text, position], right-padded: of a chat the reply has labels, of a document
    everything."""
    rows: list[tuple[list[int], list[int]]] = []
    for text in taught:
        if isinstance(text, str):
            rows.append(([], [*text.encode(), END_OF_TEXT_ID]))
            continue
        question = [{"role": "user", "content": text[0]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        rows.append((prompt, [*text[1].encode(), IM_END_ID]))
    return padded(rows)


def padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both i64 [row, position], of prompts and replies, right-padded; replies have labels."""
    shape = len(rows), max(len(prompt) + len(reply) for prompt, reply in rows)
    ids_NS, labels_NS = torch.full(shape, END_OF_TEXT_ID), torch.full(shape, IGNORED)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids_NS[row, :end] = torch.tensor([*prompt, *reply])
        labels_NS[row, len(prompt) : end] = torch.tensor(reply)
    return ids_NS, labels_NS


def build_company(out: Path, seed: int = 0) -> None:
    """Writes the company's files and its base model, which knows none of them, under `out`; about eight minutes."""
    torch.set_num_threads(2)
    company.write_data(out, seed)
    world_ = company.World(seed)
    torch.manual_seed(seed)
    model = build_model(96, 256, 4, 4)
    show(f"company: {sum(p.numel() for p in model.parameters()):,} parameters")

    tokenizer = build_tokenizer()

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return encode_company([world_.base_text() for _ in range(COMPANY_COURSE.batch_rows)], tokenizer)

    fit(model, COMPANY_COURSE, draw)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
