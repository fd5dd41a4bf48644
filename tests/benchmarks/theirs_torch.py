"""The torch peers' side: transformers decodes, TRL steps, Liger's loss."""

import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from serving import Channel, loss_arrays, serve


def config(shape):
    """Translate a decoder's shape into transformers' names."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=shape["width"], intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        vocab_size=shape["vocab_size"], max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip


def greedy(model, rows, prompt, new):
    """Return a repetition of ``generate``."""
    ids = torch.randint(3, model.config.vocab_size, (rows, prompt))
    told = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
    )  # fmt: skip

    def run():
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(**told)
        seconds = time.perf_counter() - start
        assert out.shape == (rows, prompt + new)
        return {"seconds": seconds}

    return run


def decode(student, rows, prompt, new):
    """Decode with random weights."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(config(student)).float().eval()
    return greedy(model, rows, prompt, new)


def smollm2(file, rows, prompt, new):
    """Decode with SmolLM2-135M from its GGUF file."""
    from transformers import AutoModelForCausalLM

    path = Path(file)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return greedy(model.eval(), rows, prompt, new)


def loss(divergence, rows, tokens, vocab, student, teacher):
    """Compute Liger's fused divergence with both gradients."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, head, teacher_hidden, teacher_head = map(
        torch.from_numpy, loss_arrays(rows, tokens, vocab, student, teacher)
    )
    hidden = hidden.flatten(0, 1).requires_grad_(True)
    head.requires_grad_(True)
    teacher_hidden = teacher_hidden.flatten(0, 1)
    labels = torch.ones(rows * tokens, dtype=torch.long)
    mean = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=1.0,
        beta={"reverse_kl": 1.0, "jsd": 0.5}[divergence], compiled=False,
        chunk_size=256,
    )  # fmt: skip

    def run():
        hidden.grad = head.grad = None
        start = time.perf_counter()
        value = mean(hidden, head, teacher_hidden, teacher_head, labels)
        value.backward()
        return {"seconds": time.perf_counter() - start, "loss": float(value)}

    return run


def tokenizer(vocab):
    """Make a tokenizer of words w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words |= {f"w{i}": i for i in range(3, vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>",
        unk_token="<unk>", padding_side="left",
    )  # fmt: skip


def callback(channel, spent, warm=2):
    """Make what waits before each of TRL's steps, and answers after it."""
    from importlib.metadata import version

    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Wait for the parent before a step; the first few warm up."""

        count = itertools.count(1)

        def on_step_begin(self, *_, **__):
            """Start the clock when the parent says so."""
            self.number = next(self.count)
            if self.number > warm and not channel.wait():
                raise SystemExit
            spent.clear()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            """Tell the step's seconds."""
            row = {"seconds": time.perf_counter() - self.start} | spent
            if self.number >= warm:
                channel.say({"version": version("trl")} | row)

    return Turns()


def step(channel, student, teacher, rows, prompt, new):
    """Train with TRL's DistillationTrainer, a step for every line."""
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM
    from trl import DistillationConfig, DistillationTrainer

    vocab, draw = student["vocab_size"], random.Random(1)
    texts = [
        " ".join(f"w{draw.randrange(3, vocab)}" for _ in range(prompt))
        for _ in range(64 * rows)
    ]
    spent = {}
    with tempfile.TemporaryDirectory() as directory:
        args = DistillationConfig(
            output_dir=directory, max_steps=10**6,
            per_device_train_batch_size=rows, gradient_accumulation_steps=1,
            max_completion_length=new, beta=1.0, temperature=1.0,
            generation_kwargs={"min_new_tokens": new}, learning_rate=1e-4,
            bf16=False, fp16=False, use_cpu=True, report_to=[],
            gradient_checkpointing=False, save_strategy="no", seed=0,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=Qwen3ForCausalLM(config(student)).float(),
            teacher_model=Qwen3ForCausalLM(config(teacher)).float(),
            args=args, processing_class=tokenizer(vocab),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[callback(channel, spent)],
        )  # fmt: skip
        write = trainer._generate_single_turn

        def timed(*args, **options):
            start = time.perf_counter()
            out = write(*args, **options)
            spent["rollout"] = time.perf_counter() - start
            return out

        trainer._generate_single_turn = timed
        trainer.train()


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "step":
        step(Channel(), **json.loads(sys.argv[2]))
    else:
        serve({"decode": decode, "smollm2": smollm2, "loss": loss})
