"""Launched by test_distributed.py: a run whose parameters are sharded by FSDP2, on CPUs.

accelerate offers FSDP on accelerators alone, so its state is told by hand what the launcher's arguments would say.
"""
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.training.trainer import close, create_accelerator, train


def main() -> None:
    config = parse_train_config(sys.argv[1:])
    accelerator = create_accelerator(config)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['BasicBlock'],
        state_dict_type='FULL_STATE_DICT', cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    train(config, accelerator)
    close(accelerator)


if __name__ == '__main__':
    run_command(main)
