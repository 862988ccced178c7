"""All that a run is between two steps, taken and put back."""
from typing import Any, Dict, List

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from timm.task import TrainingTask
from timm.utils import unwrap_model

__all__ = ['is_sharded', 'put_back', 'take', 'whole_weights']


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether the parameters are sharded over the processes, by FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def _modules(task: TrainingTask) -> List[nn.Module]:
    """Return what is trained and, where there is one, its moving average, without wrappers."""
    return [unwrap_model(task.get_trainable_module(ema=ema)) for ema in (False, True)[:1 + task.has_ema()]]


def whole_weights(task: TrainingTask, accelerator: Accelerator) -> Dict[str, torch.Tensor]:
    """Return the state of what is trained; all processes must ask, and sharded ones leave it to the main process."""
    if not is_sharded(accelerator):
        return _modules(task)[0].state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(task.trainable_module, options=options)


def take(task: TrainingTask, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Dict[str, Any]:
    """Return the states of networks, optimizer and gradient scaler, whole, for `put_back`; all processes must call it.

    Generators of random numbers are not in it, as the trainer makes what is drawn a function of seed and step.
    """
    if is_sharded(accelerator):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer_state = get_optimizer_state_dict(task.trainable_module, optimizer.optimizer, options=options)
    else:
        optimizer_state = optimizer.state_dict()
    trained, *average = _modules(task)
    # between two evaluations each process has batch norm averages of its own
    buffers = [[{name: b.cpu() for name, b in m.named_buffers()} for m in (trained, *average)]]
    scaler = accelerator.scaler
    return dict(
        model=whole_weights(task, accelerator),
        optimizer=optimizer_state,
        average=average[0].state_dict() if average else None,
        buffers=gather_object(buffers),
        scaler=scaler.state_dict() if scaler is not None else None,
    )


def put_back(
        state: Dict[str, Any],
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
) -> None:
    """Put back what `take` returned, in every process."""
    if is_sharded(accelerator):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        set_state_dict(
            task.trainable_module,
            optimizer.optimizer,
            model_state_dict=state['model'],
            optim_state_dict=state['optimizer'],
            options=StateDictOptions(full_state_dict=True),
        )
    else:
        optimizer.load_state_dict(state['optimizer'])
        for module, saved in zip(_modules(task), (state['model'], state['average'])):
            module.load_state_dict(saved)
    if len(state['buffers']) == accelerator.num_processes:
        own = state['buffers'][accelerator.process_index]
        for module, buffers in zip(_modules(task), own):
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    if accelerator.scaler is not None and state['scaler']:
        accelerator.scaler.load_state_dict(state['scaler'])
