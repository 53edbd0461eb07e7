"""Messages of other packages that no user of a command can act on, left out of its output."""

import logging
import warnings


def leave_out_noise(command: str) -> None:
    """Leave out the messages below in this process. Commands call it first; importing the package changes nothing.

    Args:
        command: name of the command, as `trl-emguard` knows it.
    """
    # PEFT and TRL read the old name of `is_activation_checkpointing`, whatever the user wrote.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_about_this_run)
    # The kernel answers with 4-bit weights on a CPU, and training never calls it.
    if command in ("sft", "demo"):
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_training)


def _is_about_this_run(record: logging.LogRecord) -> bool:
    """Return False for the accelerator that DeepSpeed reports where it is installed and does not train."""
    from accelerate.utils import parse_flag_from_env

    is_accelerator = record.getMessage().startswith("Setting accelerator to CPU")
    return not is_accelerator or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def _is_about_training(record: logging.LogRecord) -> bool:
    """Return False for a kernel of inference that bitsandbytes looks for when it is imported."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
