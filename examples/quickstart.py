from vllm import LLM

from vllm_tap import Spec, capture

if __name__ == "__main__":  # vLLM starts processes that import this file
    llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
    result = capture(llm, ["The capital of France is"], Spec(hidden_states="all"), temperature=0, max_tokens=4)
    sample = result[0]
    print(repr(result.outputs[0].outputs[0].text))
    print(len(sample.hidden_states), sample.hidden_states[-1].shape, sample.hidden_states[-1].dtype)
    print(sample.positions)
    print(sample.token_ids)
