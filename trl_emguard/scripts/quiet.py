"""Filters for messages from other packages that the user of a command can do nothing about."""

import logging
import warnings


def leave_out_noise(command: str) -> None:
    """Suppress a few messages of transformers, DeepSpeed and bitsandbytes that no user can act on, in this process.

    `trl-emguard` and a launched `scripts.sft` call this function before they import a command's libraries. Importing
    the package alone suppresses nothing.

    Args:
        command: name of the command, for example `sft`.
    """
    # PEFT and TRL read `is_activation_checkpointing` by its old name, so this warning comes whatever the user wrote.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_about_this_run)
    # bitsandbytes reports that it cannot load a CPU kernel for 4-bit inference. Training never calls this kernel.
    if command in ("sft", "demo", "compare"):
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_training)


def _is_about_this_run(record: logging.LogRecord) -> bool:
    """Return False for DeepSpeed's message about its accelerator, if this run does not use DeepSpeed."""
    from accelerate.utils import parse_flag_from_env

    is_accelerator = record.getMessage().startswith("Setting accelerator to CPU")
    return not is_accelerator or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def _is_about_training(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' message that a kernel for inference could not be loaded."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
