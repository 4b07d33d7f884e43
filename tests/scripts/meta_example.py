"""Shaped like the example scripts of Meta's llama3 repository (fire main, build, chat and text
completion)."""

import fire

from llama_tp import Dialog, Llama


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 8,
    max_batch_size: int = 4,
):
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    dialogs: list[Dialog] = [
        [{"role": "user", "content": "  who goes there?  "}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hark"}],
    ]
    for result in generator.chat_completion(
        dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p
    ):
        print(f"> {result['generation']['role']}: {result['generation']['content']!r}")
    for result in generator.text_completion(
        ["ROMEO:", "JULIET:\nO"],
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_p=top_p,
        logprobs=True,
        echo=True,
    ):
        print(f"> {result['generation']!r} {len(result['tokens'])} {len(result['logprobs'])}")


if __name__ == "__main__":
    fire.Fire(main)
