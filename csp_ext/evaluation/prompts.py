"""From a sample to the text and the images of a prompt, as MileBench assembles and truncates them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csp_ext.demo.console import UserError, first_line
from csp_ext.evaluation.items import REFERENCE, Item
from csp_ext.evaluation.metrics import option_letters
from csp_ext.evaluation.truncation import Context, Dropped, Limit, token_ids, truncate

TEMPLATES = ("plain", "milebench", "chat")
# As long as the system text that Llama 2 chat templates of LLaVA carry, about 55 tokens.
SYSTEM = (
    "You assist people with questions about text and pictures. You can see every picture that the user "
    "shows you, and you use what is in them, together with the words around them, to carry out what you are "
    "asked. Reply briefly, in plain language, and with nothing that was not asked."
)
# The options of image retrieval are names already: image1, image2 and so on.
WITHOUT_LETTERS = ("GPR1200",)


@dataclass(frozen=True)
class Prompt:
    """A prompt for a processor.

    Attributes
    ----------
    text : str
        With one image token per image.
    images : tuple of Path
        In the order of their tokens; empty if there are none, or truncation left none.
    question_start : int or None
        Index in `text` of the first character of the question; None if the data set does not say what the
        question is. Options and the end of the template belong to it.
    dropped : Dropped
        By truncation.
    """

    text: str
    images: tuple[Path, ...]
    question_start: int | None
    dropped: Dropped


def context_of(item: Item, image_token: str) -> Context:
    """Return a sample's context and options.

    Of combined images the text only has the numbers that are written on them. An image token that the data
    itself contains is dropped, since it would stand for an image.
    """
    context, options = item.context, _options(item)
    begin = len(context) - len(item.question or "")
    fragments, images = _split(item, context[:begin], image_token)
    more, others = _split(item, context[begin:] + options, image_token)
    question = (len(more) - 1, len(more[0])) if item.question is not None else None
    joined = (*fragments[:-1], fragments[-1] + more[0], *more[1:])
    return Context(joined, images + others, question)


def _options(item: Item) -> str:
    if not item.choices:
        return ""
    letters = [f"{letter}. " for letter in option_letters(len(item.choices))]
    if item.dataset in WITHOUT_LETTERS:
        letters = [""] * len(letters)
    lines = [letter + choice for letter, choice in zip(letters, item.choices, strict=True)]
    return "\n".join(["\nChoice list: ", *lines, "Your answer is: "])


def _split(item: Item, text: str, image_token: str) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Split a text at its references to images."""
    text = text.replace(image_token, "")
    if item.combined:
        return (REFERENCE.sub(r"<Image \1> ", text),), ()
    parts = REFERENCE.split(text)
    return tuple(parts[::2]), tuple(item.images[int(number) - 1] for number in parts[1::2])


def assemble(
    item: Item,
    image_token: str,
    *,
    template: str = "plain",
    limit: Limit | None = None,
    processor: Any = None,
) -> Prompt:
    """Make a sample's prompt.

    Parameters
    ----------
    item : Item
        The sample.
    image_token : str
        What stands for one image.
    template : str
        "plain": instruction and context as they are; "milebench": in the frame of Llama 2 chats, where
        MileBench has them for LLaVA; "chat": as one turn of the user in the processor's own chat template.
    limit : Limit, optional
        Cuts the context from the left if need be; combined images take no room.
    processor : ProcessorMixin, optional
        For "chat".

    Raises
    ------
    ValueError
        If the template is unknown.
    UserError
        If the processor has no chat template, or it refuses the prompt.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    context, dropped = context_of(item, image_token), Dropped()
    instruction = item.instruction.replace(image_token, "")
    if limit is not None:
        room = limit.tokens - len(token_ids(limit.tokenizer, instruction))
        context, dropped = truncate(context, room, limit.tokens_per_image, limit.tokenizer)
    before = f"{instruction}\n" if instruction else ""
    fragments = (before + context.fragments[0], *context.fragments[1:])
    images = context.images
    if item.combined:
        fragments = (*("",) * len(item.images), "\n" + fragments[0])
        images = item.images
    question = context.question
    if template == "chat":
        text, start = _chat(processor, fragments, question)
        return Prompt(text, images, start, dropped)
    text = image_token.join(fragments)
    start = None if question is None else len(text) - _length_from(fragments, question, image_token)
    text, start = _separate(text, start, image_token)
    if template == "milebench":
        opening = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"
        text = f"{opening}{text} [/INST]"
        start = None if start is None else start + len(opening)
    return Prompt(text, images, start, dropped)


def _length_from(fragments: tuple[str, ...], question: tuple[int, int], image_token: str) -> int:
    after, characters = question
    rest = fragments[len(fragments) - after :]
    return characters + sum(len(image_token) + len(fragment) for fragment in rest)


def _separate(text: str, start: int | None, image_token: str) -> tuple[str, int | None]:
    """Put newlines after both of two adjacent image tokens; move an index along with its character."""
    pairs = [pair.start() for pair in re.finditer(re.escape(image_token * 2), text)]
    size = len(image_token)
    if start is not None:
        start += sum((pair + size <= start) + (pair + 2 * size <= start) for pair in pairs)
    return text.replace(image_token * 2, f"{image_token}\n{image_token}\n"), start


def _chat(
    processor: Any, fragments: tuple[str, ...], question: tuple[int, int] | None
) -> tuple[str, int | None]:
    """Render one turn of the user; find the question's first words in it."""
    if not getattr(processor, "chat_template", None):
        raise UserError("the processor has no chat template; choose the template plain or milebench")
    content: list[dict[str, Any]] = []
    for at, fragment in enumerate(fragments):
        content += [{"type": "image"}] if at else []
        content += [{"type": "text", "text": fragment}] if fragment.strip() else []
    try:
        turn = [{"role": "user", "content": content}]
        text = str(processor.apply_chat_template(turn, add_generation_prompt=True))
    except Exception as error:  # templates raise anything from TypeError to jinja's own
        raise UserError(f"the chat template refuses this prompt: {first_line(error)}") from error
    if question is None:
        return text, None
    after, characters = question
    fragment = fragments[len(fragments) - 1 - after]
    # A template may strip a text, but it does not change its inside.
    words = fragment[len(fragment) - characters :].strip()
    found = text.rfind(words) if words else -1
    return text, found if found >= 0 else None
