"""Secondary information: what a network's scores say about the classes that an image does not belong to.

The notion is that of Yang et al. (AAAI 2019, arXiv 1805.05551): a teacher that keeps in its scores which other classes
an image resembles teaches better than one that is merely sure. The paper shows it by the students' accuracy. The
figures here are this package's own.
"""
from typing import Dict, Optional

import torch
import torch.nn.functional as F

__all__ = ['secondary_information']


@torch.no_grad()
def secondary_information(
        logits: torch.Tensor,
        target: torch.Tensor,
        k: int = 5,
        superclasses: Optional[torch.Tensor] = None,
        teacher_logits: Optional[torch.Tensor] = None,
) -> Dict[str, torch.Tensor]:
    """Measure the secondary information in a network's softmax scores, image by image.

    Args:
        logits: (N, num_classes).
        target: Labels (N,).
        k: Classes that count as similar, the primary one included, as in the paper's K.
        superclasses: Superclass of each class (num_classes,), such as CIFAR-100's coarse labels. The siblings of a
            label are the other classes of its superclass.
        teacher_logits: The teacher's logits (N, num_classes) for the same images.

    Returns:
        One value an image, each (N,):

        - `top_score`: the largest score.
        - `runner_up_score`: the mean of the scores ranked 2 to k.
        - `entropy`: of all scores, in nats.
        - `sibling_mass`, with superclasses: the sum of the siblings' scores, without the label's own.
        - `sibling_share`, with superclasses: leave the label out, take the k − 1 classes with the largest scores, and
          this is the part of them, 0 to 1, that are siblings. Below 1 where the label has fewer than k − 1.
        - `teacher_kl`, with a teacher: KL(teacher ‖ network) of the scores, in nats.
        - `teacher_agreement`, with a teacher: 1 where both put the same class first, else 0.

    Raises:
        ValueError: `k` is out of range, or superclasses or teacher are for other classes or images.
    """
    num_classes = logits.shape[-1]
    if not 2 <= k <= num_classes:
        raise ValueError(f'k={k}: expected 2 to {num_classes}, the number of classes.')
    log_scores = logits.float().log_softmax(-1)
    scores = log_scores.exp()
    ranked = scores.topk(k).values
    out = dict(
        top_score=ranked[:, 0],
        runner_up_score=ranked[:, 1:].mean(-1),
        entropy=torch.special.entr(scores).sum(-1),
    )
    if superclasses is not None:
        if superclasses.shape != (num_classes,):
            raise ValueError(
                f'superclasses of shape {tuple(superclasses.shape)}: expected {(num_classes,)}, one for each class.')
        superclasses = superclasses.to(target.device)
        label = F.one_hot(target, num_classes).bool()
        siblings = (superclasses == superclasses[target][:, None]) & ~label
        others = scores.masked_fill(label, -1.).topk(k - 1).indices
        out['sibling_mass'] = (scores * siblings).sum(-1)
        out['sibling_share'] = siblings.gather(-1, others).float().mean(-1)
    if teacher_logits is not None:
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f'teacher_logits of shape {tuple(teacher_logits.shape)}: expected {tuple(logits.shape)}, the same '
                f'images and classes as the network\'s.'
            )
        teacher = teacher_logits.float().log_softmax(-1)
        out['teacher_kl'] = F.kl_div(log_scores, teacher, reduction='none', log_target=True).sum(-1)
        out['teacher_agreement'] = (teacher.argmax(-1) == logits.argmax(-1)).float()
    return out
