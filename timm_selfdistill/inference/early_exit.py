"""EarlyExit: runs each image only as deep as it needs."""
import logging
import threading
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from timm.utils import unwrap_model

from ..costs import compute_costs, measure_costs
from ..metrics import ExitEvaluator, collect_logits
from ..models.exit_rule import ExitRule, Thresholds, follow_rule
from ..models.multi_exit import MultiExit
from ..models.names import model_name
from ..models.rule_notes import Leaving
from .batches import check_images, digests, read_batch, read_images
from .calibration import Calibration, check_aim, choose_point, exit_curve, fit_temperatures
from .drift import Drift, ExitCounter, compare_leaving
from .gates import with_gates
from .ready import Ready, device_and_dtype
from .risk_control import Risk, check_promise, choose_safely
from .runners import Runner

__all__ = ['EarlyExit', 'EarlyExitOutput']

_logger = logging.getLogger(__name__)

Batches = Iterable[Any]

_making_ready = threading.Lock()


@dataclass(frozen=True)
class EarlyExitOutput:
    """What became of a batch, in the order in which the images came.

    Attributes:
        logits: Logits of the exit that each image took (N, num_classes), or the mean of those up to there; float32
            where the network computes in half precision.
        exit_index: Number of this exit (N,).
        temperatures: Its temperature (N,).
    """
    logits: torch.Tensor
    exit_index: torch.Tensor
    temperatures: torch.Tensor

    @property
    def probabilities(self) -> torch.Tensor:
        """Calibrated probabilities (N, num_classes)."""
        return (self.logits / self.temperatures[:, None]).softmax(-1)


class EarlyExit:
    """Runs each image only as deep as it needs.

    One pass through the network: at each exit the images that are sure leave, the rest go on in a smaller batch; when
    none is left the network stops. How they leave is found out by probing a copy with random weights: most networks
    can be resumed behind the module that makes the map an exit takes (found by comparing outputs). Where something else
    passes that place too, the network is cut into graphs, which takes some seconds here and ties it to the size of
    images it was built for. Where that fails, whole batches run to the end; `repr` says so.

    What runs is always the network in eval mode, in whatever mode it is, by a view of its own that shares parameters
    and buffers. So any number of threads may call it, also while the network is trained; hooks on its modules are
    called if they were there before the predictor.

    Args:
        model: The network. It is held, not copied. What torch.compile or DistributedDataParallel put around it is taken
            off: images leave between its modules, which are not compiled here.
        thresholds: Where an image is sure enough, see `ExitRule`. When this and all that follows are left out, the rule
            that came with the model (`model.exit_rule`) is taken; if it has none, no image leaves early.
        criterion: What the thresholds are compared with, one of `CRITERIA`, or `gate`: what small networks over the
            exits' scores say, which `calibrate` trains and which are saved with the weights.
        temperatures: One for each exit, see `ExitRule`.
        ensemble: Let all exits passed so far decide together.
        compile: Compile the network from exit to exit with torch.compile. This takes a minute or more, bit by bit as
            batches come, and ties it to the size of images it was built for. What is left of a batch is padded to the
            next power of two, so that no number of images is compiled anew.

    Attributes:
        model: The network.
        rule: The `ExitRule` in force.
        counter: Counts the images that `run` has seen, by the exits that they left at: `counter.images`, and with what
            confidence score on average, `counter.confidence`. `counter.reset()` begins anew.

    Raises:
        ValueError: A value does not fit the network, it has no exits, or it is to be compiled and cannot be cut into
            graphs.

    Examples:
        >>> import timm, timm_selfdistill
        >>> predictor = EarlyExit(timm.create_model('resnet20_cifar_sd', pretrained=True), thresholds=0.5)
        >>> out = predictor(torch.randn(2, 3, 32, 32))
        >>> out.logits.shape, out.exit_index.shape
        (torch.Size([2, 100]), torch.Size([2]))
    """

    def __init__(
            self,
            model: MultiExit,
            thresholds: Thresholds = None,
            criterion: str = 'confidence',
            temperatures: Optional[Sequence[float]] = None,
            ensemble: bool = False,
            compile: bool = False,
    ):
        model = unwrap_model(model)
        if not isinstance(model, MultiExit):
            raise ValueError(f'{model_name(model)} has no exits to leave at: expected a model such as resnet50_sd.')
        self.model = model
        own = thresholds is None and criterion == 'confidence' and temperatures is None and not ensemble
        if own and model.exit_rule is not None:
            self.rule = model.exit_rule
        else:
            gates = model.exit_gates if criterion == 'gate' and len(model.exit_gates) else None
            self.rule = ExitRule(
                model.num_exits, model.num_classes, thresholds, criterion, temperatures, ensemble, gates=gates)
        self._compile = compile
        self._ready = Ready(model, compile)
        if not self.compacts:
            _logger.warning(f'{model_name(model)}: {self.runner.how}')
        self._calibrated_on: Set[bytes] = set()
        self.counter = ExitCounter(model.num_exits)

    def __repr__(self) -> str:
        return f'EarlyExit({model_name(self.model)}; {self.rule}; {self.runner.how})'

    @property
    def compacts(self) -> bool:
        """Whether images that leave are spared the rest of the network."""
        return self.runner.kind != 'whole'

    @property
    def runner(self) -> Runner:
        """How the network is executed."""
        return self._ready.runner

    def _make_ready(self) -> Ready:
        """Return how to run the network as it is now.

        Raises:
            ValueError: It has other exits or classes than the rule was made for.
        """
        ready = self._ready
        if not ready.fits(self.model):
            now, then = (self.model.num_exits, self.model.num_classes), (self.rule.num_exits, self.rule.num_classes)
            if now != then:
                raise ValueError(
                    f'{model_name(self.model)} has {now[0]} exits and {now[1]} classes now, the rule was made for '
                    f'{then[0]} and {then[1]}: make a new EarlyExit.'
                )
            with _making_ready:
                if not self._ready.fits(self.model):
                    self._ready = Ready(self.model, self._compile)
                ready = self._ready
        return ready

    def _put(self, images: torch.Tensor) -> torch.Tensor:
        """Move images where the model is, in its precision."""
        device, dtype = device_and_dtype(self.model)
        return check_images(images).to(device, dtype, non_blocking=True)

    def __call__(self, images: torch.Tensor) -> EarlyExitOutput:
        return self.run(images)

    @torch.no_grad()
    def run(self, images: torch.Tensor) -> EarlyExitOutput:
        """Classify images, each by the first exit that is sure of it.

        Args:
            images: Images (N, C, H, W), preprocessed, where the model is; they are taken to its precision. The model
                may be in any mode, which is of no account and stays.

        Raises:
            ValueError: There are no images, they are no floating point tensor of this shape or not of a size that the
                network takes, some hold NaN, or the network has other exits or classes by now.
        """
        images = check_images(images).to(device_and_dtype(self.model)[1])
        run = self._make_ready().runner
        rule, heads = self.rule, self.model.exit_heads
        here: Optional[torch.Tensor] = None  # rows of the images that are still in the batch, None for all
        memory: Dict[str, torch.Tensor] = {}
        taken = exits = scores = None
        last = 0  # the exit that all images left at, as long as they are all together

        def at_exit(number: int, logits: torch.Tensor) -> Optional[torch.Tensor]:
            nonlocal here, memory, taken, exits, scores, last
            decided, sure, memory = rule.judge(number, logits, memory)
            # what images that go on are given here a later exit overwrites, which costs less than to sort them out
            if here is None:
                taken, scores, last = decided, sure, number
            else:
                taken[here], scores[here], exits[here] = decided, sure, number
            if number == rule.num_exits - 1:
                return None
            leaves = sure >= rule.level(number)
            if len(sure) == 1:  # where most of the time goes into launching operations
                return torch.empty(0, dtype=torch.long, device=leaves.device) if leaves else None
            rows = leaves.logical_not().nonzero().squeeze(1)  # waits for the device, once
            if len(rows) in (0, len(sure)):
                return rows if not len(rows) else None
            if here is None:
                here, exits = rows, torch.full(leaves.shape, number, device=leaves.device)
            else:
                here = here[rows]
            memory = {name: value[rows] for name, value in memory.items()}
            return rows

        # a head whose logits the next one takes runs in any case
        wanted = [rule.asks(i) or any(h.takes_logits for h in heads[i + 1:]) for i in range(rule.num_exits)]
        run(images, at_exit, wanted)
        if taken.isnan().any():
            self._explain_nan(images, taken)
        if here is None:
            exits = torch.full(taken.shape[:1], last, device=taken.device)
            temperatures = taken.new_full(taken.shape[:1], rule.temperatures[last])
        else:
            temperatures = taken.new_tensor(rule.temperatures)[exits]
        self.counter.add(exits, scores)
        return EarlyExitOutput(taken, exits, temperatures)

    def drift(self, significance: float = 0.01) -> Drift:
        """Compare where images leave now with where they left when the thresholds were chosen.

        A guarantee, and any accuracy measured, is of images drawn like those of the calibration. When other ones come,
        such as darker photos, or of another camera, they mostly leave elsewhere, which shows without labels.

        Args:
            significance: Probability with which a drift may be reported where there is none.

        Returns:
            Both histograms and the verdict; printed, it is a sentence.

        Raises:
            ValueError: The rule was not chosen by `calibrate`, no images have been run yet, or the significance does
                not lie between 0 and 1.
        """
        if self.rule.leaving is None:
            raise ValueError(
                'Where images left at calibration is not known of these thresholds: choose them with calibrate().')
        return compare_leaving(self.counter.images, self.rule.leaving.images, significance)

    def _explain_nan(self, images: torch.Tensor, logits: torch.Tensor) -> None:
        for what, tensor in (('images', images), ('logits', logits)):
            rows = tensor.flatten(1).isfinite().all(1).logical_not().nonzero().squeeze(1).tolist()
            if rows:
                some = ', '.join(map(str, rows[:10])) + (', ...' if len(rows) > 10 else '')
                raise ValueError(f'{what} {some} of {len(images)}: not finite, so no exit can be sure of them.')

    def simulate(self, logits: Sequence[torch.Tensor]) -> EarlyExitOutput:
        """Report what `run` would give, from logits that exist already; it saves nothing and runs nothing.

        Args:
            logits: Logits of every exit, each (N, num_classes), as `forward_exits` gives them.

        Raises:
            ValueError: There is not one tensor an exit, or their shapes are others.
        """
        expected = (len(logits[0]) if len(logits) else 0, self.rule.num_classes)
        if len(logits) != self.rule.num_exits or any(tuple(z.shape) != expected for z in logits):
            raise ValueError(
                f'logits of the shapes {[tuple(z.shape) for z in logits]}: expected {self.rule.num_exits} times '
                f'(N, {self.rule.num_classes}), one for each exit.'
            )
        decided, exits = follow_rule(self.rule, logits)
        return EarlyExitOutput(decided, exits, decided.new_tensor(self.rule.temperatures)[exits])

    def calibrate(
            self,
            loader: Batches,
            budget: Optional[float] = None,
            accuracy_drop: Optional[float] = None,
            latency: Optional[float] = None,
            risk: Optional[float] = None,
            confidence: float = 0.95,
            risk_of: Risk = 'accuracy',
            bound: Optional[str] = None,
    ) -> Calibration:
        """Choose temperatures and thresholds on held-out data.

        The rule's criterion stays, and whether exits decide together. The new rule is in force at once and is noted in
        the model (`model.exit_rule`), so that it is saved with it.

        Args:
            loader: Images (N, C, H, W) and labels (N,) that neither training nor testing has to do with, as pairs or
                dicts, see `read_batch`.
            budget: MACs that an image may take on average, as a share of the plain network's. The most
                accurate thresholds within it are chosen.
            accuracy_drop: Percentage points of top-1 accuracy that may be lost against running everything to the end:
                against the deepest exit, or with `ensemble` against all exits together. The cheapest thresholds that
                do so are chosen.
            latency: Milliseconds that an image may take on average, on this machine and in batches as the loader's
                first; chosen like a budget, from the time that each part of the network is measured to take.
            risk: A promise in place of an aim: early exit loses this share of accuracy at most, 0.01 for one point,
                with the probability `confidence` over the images given. The cheapest thresholds that can promise it are
                chosen, see `risk_control.choose_safely`; where none can, nothing leaves early.
            confidence: See there.
            risk_of: `accuracy`, or `agreement`: the share of images that are classified otherwise than at the end. Then
                no labels are needed, nor looked at.
            bound: By which test, a name in `risk_control.BOUNDS`; the tighter one when None.

        Returns:
            The rule, what it comes to on these data, and the whole curve of accuracy over cost.

        Raises:
            ValueError: Not exactly one of the four is given, or what goes with `risk` without it; no thresholds reach
                it; there are no images, or too few to promise it; some are of classes that the network does not know;
                or a batch cannot be read. Nothing is changed then.
        """
        check_aim(budget, accuracy_drop, latency, risk)  # before all the work
        check_promise(risk, confidence, risk_of, bound)
        labelled = risk is None or risk_of == 'accuracy'
        seen: Set[bytes] = set()
        first: List[torch.Tensor] = []

        def checked() -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
            for batch in loader:
                if labelled:
                    images, target = read_batch(batch, self.rule.num_classes)
                else:
                    images = read_images(batch)
                    target = torch.zeros(len(images), dtype=torch.long)
                seen.update(digests(images))
                images = self._put(images)
                first[:] = first or [images]
                yield images, target
            if not first:
                raise ValueError('There are no images.')

        view = self._make_ready().view
        logits, target = collect_logits(view, checked())
        if latency is None:
            costs = compute_costs(view, tuple(first[0].shape[1:]))
        else:
            costs = measure_costs(view, first[0])
        if risk is None:
            temperatures = fit_temperatures(logits, target, self.rule.ensemble)
            rule = replace(self.rule, thresholds=None, temperatures=temperatures)
            rule = with_gates(rule, logits, target)
            curve = exit_curve(rule, logits, target, costs)
            point = choose_point(curve, budget, accuracy_drop, latency)
            self.rule = replace(rule, thresholds=point['thresholds'])
        else:
            self.rule, point, curve = choose_safely(
                self.rule, logits, target if labelled else None, costs, risk, confidence, risk_of, bound)
            if point['thresholds'] == curve[0]['thresholds']:
                _logger.warning(f'No thresholds can promise risk={risk!r} on these images: nothing leaves early.')
        # exact, as a share is a count over the count of images
        left = tuple(round(share * len(target)) for share in point['leaving'])
        self.rule = replace(self.rule, leaving=Leaving(left, self.rule.digest()))
        self.model.exit_rule = self.rule
        self.counter.reset()
        self._calibrated_on = seen
        return Calibration(self.rule, point, curve, len(target), costs)

    def evaluate(self, loader: Batches) -> Dict[str, Any]:
        """Measure accuracy and cost by running images.

        Args:
            loader: Images (N, C, H, W) and labels (N,), as `calibrate` takes them.

        Returns:
            loss, top1, top5, ece and aurc as of `metrics.ExitEvaluator`, with the temperatures applied; `count`;
            `cost`, the MACs of an image on average as a share of the plain network's; and `leaving`, the share of the
            images that left at each exit.

        Raises:
            ValueError: The thresholds were calibrated on these images (more than 1 % of them; public test sets do hold
                images of their training sets), there are none, some are of classes that the network does not know, or a
                batch cannot be read.
        """
        device = device_and_dtype(self.model)[0]
        evaluator = ExitEvaluator(device)
        leaving = torch.zeros(self.rule.num_exits, dtype=torch.long)
        size: Tuple[int, ...] = ()
        known = 0
        for batch in loader:
            images, target = read_batch(batch, self.rule.num_classes)
            known += sum(digest in self._calibrated_on for digest in digests(images))
            out = self.run(self._put(images))
            evaluator.update(out.probabilities.log(), target.to(device, non_blocking=True))
            leaving += out.exit_index.cpu().bincount(minlength=len(leaving))
            size = tuple(images.shape[1:])
        if not size:
            raise ValueError('There are no images.')
        count = leaving.sum().item()
        if known > 0.01 * count:
            raise ValueError(
                f'{known} of {count} images are among those that the thresholds were chosen on: measured on them these '
                f'would look better than they are. Keep the two splits apart.'
            )
        shares = (leaving / count).tolist()
        costs = compute_costs(self._make_ready().view, size).of(self.rule)
        cost = sum(share * cost for share, cost in zip(shares, costs))
        return dict(evaluator.compute(), cost=cost, leaving=shares)
