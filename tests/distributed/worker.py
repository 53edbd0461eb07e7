"""One rank of a launched run: trains its cells one after the other, and writes the results to disk.

`accelerate launch … worker.py JOB.json`, where the job names the engine, the cells and the folders. A cell is a
defense, a way of tuning and a mode of checkpointing. Starting Python costs far more than a cell does, so a launch
takes many of them.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from functools import cache
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from methods import merged, reads
from private import forget_accelerate
from tiny import Hub, config, lora, make_pool, make_rows, make_tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import trl_emguard.trainer
from trl_emguard import EMGuardTrainer
from trl_emguard.reference.kinds import ModelReference


STEPS = 6
GLOBAL_BATCH = 4


def options_of(cell: dict, job: dict, ranks: int) -> dict:
    """Return the options of a cell's run. Ranks differ from one process only in the size of a batch."""
    options = {
        "defense": cell["defense"],
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": cell["checkpointing"],
        # Adam would make a whole step of a gradient that is only rounding.
        "adam_epsilon": 1e-3,
        **merged(cell["defense"], "options"),
        "seed": 7,
    }
    if reads(cell["defense"], "vector"):
        options["steering_vector"] = job["vector"]
    if reads(cell["defense"], "adapter"):
        options["inoculation_adapter"] = job["adapter"]
    if job["engine"] != "one":
        options |= {"ddp_backend": "gloo", "use_cpu": job["engine"] in ("ddp", "fsdp2")}
    return {**options, **cell["options"]}


def rows_of(cell: dict) -> Dataset:
    if cell["options"].get("inoculation_rows") == "flagged":
        return make_rows(48).add_column("inoculate", [i % 3 > 0 for i in range(48)])
    if not cell["unlabelled"]:
        return make_rows(48)
    # Rank 0 gets the first two rows of each batch, and rank 1 the others, which have no labels.
    tokens = [[5 + (i * k) % 250 for k in range(4 + i % 7)] for i in range(48)]
    labels = [[-100] * len(row) if i % 4 > 1 else [-100, *row[1:]] for i, row in enumerate(tokens)]
    return Dataset.from_list([{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)])


def make_trainer(cell: dict, job: dict, folder: Path) -> EMGuardTrainer:
    options = options_of(cell, job, int(os.environ.get("WORLD_SIZE", "1")))
    return EMGuardTrainer(
        job["models"][cell["architecture"]],
        config(folder, **options),
        train_dataset=rows_of(cell),
        eval_dataset=make_rows(8) if "eval_strategy" in options else None,
        processing_class=make_tokenizer(),
        peft_config=lora(**cell["lora"]) if cell["tuning"] == "lora" else None,
        interleave_dataset=make_pool(60) if reads(cell["defense"], "pool") else None,
    )


def train(cell: dict, job: dict) -> dict:
    folder, hub = Path(job["output"]) / cell["id"], Hub()
    transformers.trainer.hf_api = lambda: hub
    trainer = make_trainer(cell, job, folder)
    assert not cell["unlabelled"] or len(trainer.train_dataset) == 48, "rows without labels were left out"
    seen = watch(trainer, job["engine"])
    trainer.train()
    if cell["resumed"]:
        forget_accelerate(with_ranks=False)
        trainer = make_trainer(cell, job, folder)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    trainer.save_model(str(folder))
    return {
        "ranks": trainer.accelerator.num_processes,
        "engine": engine_of(trainer),
        "history": trainer.state.log_history,
        "pushed": [push.record["global_step"] for push in hub.pushed],
        **seen(),
    }


def engine_of(trainer: EMGuardTrainer) -> str:
    """Return the engine that has trained, known by the class that wraps the model."""
    model = trainer.model_wrapped
    if isinstance(model, FSDPModule):
        return "fsdp2"
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    return f"zero{model.zero_optimization_stage()}" if hasattr(model, "zero_optimization_stage") else "one"


def watch(trainer, engine: str):
    """Watch a trainer while it trains.

    Returns:
        A function to call after training. It returns the largest share of the policy's and of a separate reference's
        weights that this rank held after a step, and how often DeepSpeed discarded a prefetch trace.
    """
    held = {"policy": 0.0, "reference": 0.0}
    invalidated = []
    if engine == "zero3":
        invalidated = invalidations()
        invalidated.clear()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held["policy"] = max(held["policy"], share_held(trainer.model))
            if isinstance(trainer.reference, ModelReference):
                held["reference"] = max(held["reference"], share_held(trainer.reference.model))

    trainer.add_callback(Look())
    return lambda: {"held": held, "invalidated": len(invalidated)}


@cache
def invalidations() -> list:
    """Return a list that gets an entry whenever DeepSpeed discards a prefetch trace."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    found, throw_away = [], Coordinator._invalidate_trace

    def counted(coordinator):
        found.append(coordinator)
        throw_away(coordinator)

    Coordinator._invalidate_trace = counted
    return found


def share_held(model: torch.nn.Module) -> float:
    """Return the share of a model's numbers that is in this rank's memory."""
    here, whole = 0, 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += local.numel() + (parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0)
        whole += getattr(parameter, "ds_numel", parameter.numel())
    return here / whole


def shard_on_the_cpu() -> None:
    """Make accelerate shard by FSDP2 on the CPU, which it otherwise leaves unsharded in silence."""
    init = AcceleratorState.__init__

    def init_sharded(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init_sharded
    # The trainer refuses such a run elsewhere.
    trl_emguard.trainer.check_launch = lambda args: None


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["engine"] == "fsdp2":
        shard_on_the_cpu()
    if job["engine"].startswith("zero"):
        # DeepSpeed's own collectives for CPUs need a compiler, which may be missing. gloo's are used.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # DeepSpeed treats the CPU as an accelerator, and transformers would look for a GPU with bf16.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    rank = int(os.environ.get("RANK", "0"))
    for cell in job["cells"]:
        forget_accelerate(with_ranks=False)
        try:
            result = train(cell, job)
        except Exception:
            result = {"error": traceback.format_exc()}
        path = Path(job["output"]) / f"{cell['id']}.{rank}.json"
        path.write_text(json.dumps(result))
        if "error" in result:
            print(result["error"], file=sys.stderr)
            os._exit(1)  # the other rank waits for this one
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
