"""Rows over HTTP. First `vllm-tap serve MODEL`; then `python examples/serve.py MODEL`, the same MODEL."""

from __future__ import annotations

import sys
import uuid

import openai

import vllm_tap


def main(model: str, url: str = "http://localhost:8000/v1", key: str = "none") -> None:
    """Read rows of finished requests, and of one that is under way."""
    client, tap = openai.OpenAI(base_url=url, api_key=key), vllm_tap.HttpTap(url, api_key=key)
    extra = tap.extra_body(vllm_tap.Spec(hidden_states=[0, -1]))
    reply = client.completions.create(model=model, prompt=["The sky is", "Two and two"], max_tokens=8, extra_body=extra)
    for choice, sample in zip(reply.choices, tap.samples(reply), strict=True):
        print(repr(choice.text), {layer: rows.shape for layer, rows in sample.hidden_states.items()})
    tap.delete(reply)

    name = uuid.uuid4().hex
    given = {"model": model, "prompt": "Once upon a time", "max_tokens": 32, "stream": True}
    with client.completions.create(**given, extra_body=extra, extra_headers={"X-Request-Id": name}) as stream:
        for block in tap.stream_rows(name):
            print(block.positions.tolist(), block.hidden_states[-1].norm(dim=-1).tolist())
        print("".join(chunk.choices[0].text for chunk in stream))


if __name__ == "__main__":
    main(*sys.argv[1:])
