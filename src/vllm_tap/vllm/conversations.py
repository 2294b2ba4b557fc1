"""Conversations as prompts of an `AsyncLLM`, made as `LLM.chat` makes them. In the process that holds it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

OF_TEMPLATE: Final = {"add_generation_prompt": True, "continue_final_message": False, "tools": None}
"""Variables of a chat template, unless the caller says otherwise."""


async def prompt_of(llm: Any, conversation: Any, options: Mapping[str, Any]) -> Any:
    """Return what `generate` takes for a conversation.

    Args:
        llm: An `AsyncLLM`.
        conversation: Messages.
        options: What `LLM.chat` takes beside them.

    Raises:
        ValueError: vLLM cannot render it, say because the model has no chat template.
    """
    from vllm.utils.mistral import is_mistral_tokenizer

    renderers, renderer = sys.modules["vllm.renderers"], llm.renderer
    given = {**OF_TEMPLATE, "tokenize": is_mistral_tokenizer(renderer.tokenizer)}
    given |= {name: options[name] for name in OF_TEMPLATE if name in options}
    processor = options.get("mm_processor_kwargs")
    chat_params = renderers.ChatParams(
        chat_template=options.get("chat_template"),
        chat_template_content_format=options.get("chat_template_content_format", "auto"),
        chat_template_kwargs=renderers.merge_kwargs(options.get("chat_template_kwargs"), given),
        mm_processor_kwargs=processor,
    )
    _, (prompt,) = await renderer.render_chat_async(
        [conversation],
        chat_params,
        renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False),  # the template writes them
        prompt_extras=None if processor is None else {"mm_processor_kwargs": processor},
    )
    return prompt
