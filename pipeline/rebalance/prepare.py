"""Every check of stage 2 before its first fit, and the description of what it would do."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache, refuse_unwritable
from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks, planned_ranks
from pipeline.errors import ConfigError, PipelineError
from pipeline.paths import results_folder
from pipeline.prepared import Prepared, Write, classes_text, device_numbers, device_text
from pipeline.rebalance.candidates import candidates, count_lam, is_trained, method_names, penalty_of, references
from pipeline.rebalance.estimate import FOLD_FITS, Work, comparison_work
from pipeline.rebalance.load import has_validation, open_store
from pipeline.rebalance.methods.external import add_external_heads
from pipeline.rebalance.overwrite_check import refuse_other_results
from pipeline.rebalance.tuning import is_comparison, lams_of, refuse_double_balancing, tuned_methods
from pipeline.resources import free_memory
from pipeline.results.head_id import HeadId
from pipeline.store_settings import store_settings

HEAD_BYTES, COPIES = 4096, 3  # of a head: its rows and scores; its numbers as fitted, stacked and written
CLEAN_ONLY = "the store has the clean view alone: no augmentation"


@dataclass(frozen=True)
class FitPlan:
    """The heads of one configuration.

    Arguments:
        config: the settings, with the views that the store has.
        references: rows that stand beside the candidates.
        candidates: heads to choose among; for `auto` and tuned methods the first of them.
        chosen_on: `val` or `kfold`; None for a single candidate.
    """

    config: RebalanceConfig
    references: tuple[HeadId, ...]
    candidates: tuple[HeadId, ...]
    chosen_on: str | None

    @property
    def bound(self) -> str:
        """Return `at most` where tuning may stop early, `at least` where `auto` adds λ, nothing where the heads are known."""
        if is_comparison(self.config):
            return "at most"
        auto = self.config.lam.strip() == "auto" and "iwb" in method_names(self.config.method)
        return "at least" if auto else ""

    @property
    def work(self) -> dict[str, Work]:
        """Return the work of each part of the fit, by name."""
        if self.chosen_on and is_comparison(self.config):
            return comparison_work(self.config)
        heads = self.trained_heads * (FOLD_FITS if self.chosen_on == "kfold" else 1)
        return {"heads": Work(heads, heads * self.config.epochs)}

    @property
    def trained_heads(self) -> int:
        """Heads that are fitted in all batch orders, within `bound`."""
        if is_comparison(self.config):
            trained = sum(is_trained(HeadId(method)) for method in tuned_methods(self.config))
            again = (len(self.config.seeds) - 1) * (trained + len(lams_of(self.config)))
            return trained * self.config.trials + again + len(self.config.seeds)
        heads = dict.fromkeys([*self.references, *self.candidates])
        return sum(map(is_trained, heads)) * len(self.config.seeds)


@dataclass(frozen=True, eq=False)
class PreparedRebalance:
    """A rebalance, or an ablation, that has passed every check: `rebalance` and `ablate` execute it.

    Arguments:
        description: what it would do; `--dry-run` prints it.
        config: the settings as they were asked for.
        plans: of a rebalance one, of an ablation one for each variant.
        out: folder of the results.
        notes: on the store and its views.
    """

    description: Prepared
    store: Cache
    config: RebalanceConfig
    plans: tuple[FitPlan, ...]
    out: Path
    ranks: Ranks
    notes: tuple[str, ...]


def prepare_rebalance(
    store: Cache | Path | str,
    config: RebalanceConfig | None = None,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    world: int = 1,
    ranks: Ranks | None = None,
) -> PreparedRebalance:
    """Return the rebalance that a configuration asks for, checked; features are not read and nothing is written.

    Arguments:
        config: by default the store's own; its variants are left aside.
        out: by default rebalance/ beside the store.
        world: processes that would fit.
        ranks: the processes that will fit, where they are running; `device` and `world` do not count then.
    Raises:
        ConfigError: settings that contradict each other or the store.
        DataError: a store that cannot be fitted on, or other results in `out`.
        PipelineError: a folder that cannot be written.
    """
    folder = Path(out or results_folder(store))
    refuse_other_results(folder)
    config = config or store_settings(store)
    return _prepare(store, config, [config], folder, "results.json", ranks or planned_ranks(device, world))


def prepare_ablation(
    store: Cache | Path | str,
    config: RebalanceConfig,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    world: int = 1,
    ranks: Ranks | None = None,
) -> PreparedRebalance:
    """Return the ablation of a configuration's variants, each of them checked; features are not read.

    Arguments:
        out: by default ablations/variants beside the store.
    Raises: as prepare_rebalance; results of something else in `out` are no error, as an ablation writes other files.
    """
    folder = Path(out or results_folder(store, "ablations") / "variants")
    return _prepare(store, config, variants_of(config), folder, "ablation.json", ranks or planned_ranks(device, world))


def variants_of(config: RebalanceConfig) -> list[RebalanceConfig]:
    """Return the settings of every variant, or the configuration itself where it lists none."""
    return [config.with_variant(variant) for variant in config.variants] or [config]


def _prepare(
    store: Cache | Path | str,
    config: RebalanceConfig,
    configs: Sequence[RebalanceConfig],
    out: Path,
    file: str,
    ranks: Ranks,
) -> PreparedRebalance:
    for single in configs:  # a typing error is reported before anything is read
        count_lam(single.lam), method_names(single.method)
        refuse_double_balancing(single)
    opened, notes = open_store(store)
    plans = tuple(plan_fit(single, opened, with_references=file == "results.json") for single in configs)
    try:
        refuse_unwritable(out)
    except OSError as error:
        raise PipelineError(f"{out}: {error.strerror}; choose a folder you may write to with --out") from error
    clean_only = any(plan.config.views != single.views for plan, single in zip(plans, configs, strict=True))
    notes += (CLEAN_ONLY,) if clean_only else ()
    rows, views = int(opened.counts.sum()), opened.views("train")
    numbers = _numbers(plans, rows=rows, views=views)
    heads = numbers["heads"] if file == "results.json" else None
    splits = ", ".join(f"{opened.rows(split):,} {split}" for split in opened.splits)
    description = Prepared(
        command="rebalance",
        config={"rebalance": config.model_dump(mode="json")},
        facts={
            "store": f"{opened.path}: {splits}; {views} view(s), {opened.width} features each",
            "classes": classes_text(opened.class_names, np.asarray(opened.counts)),
            "fits": _fits_text(plans, numbers),
            "on": device_text(ranks, "float32"),
        },
        numbers={"store": str(opened.path), "digest": opened.digest, "network": network_of(opened), **numbers}
        | device_numbers(ranks, "float32"),
        writes=(
            Write(
                out,
                None if heads is None else _heads_bytes(heads, classes=len(opened.counts), width=opened.width),
                "results there are replaced" if (out / file).is_file() else "new",
            ),
        ),
        notes=notes,
    )
    return PreparedRebalance(description, opened, config, plans, out, ranks, notes)


def plan_fit(config: RebalanceConfig, store: Cache, *, with_references: bool = True) -> FitPlan:
    """Return the heads of one configuration on a store.

    Arguments:
        with_references: fit the reference rows too.
    Raises: ConfigError: views, λ or a choice that are not possible on this store.
    """
    if config.views == "augmented" and store.views("train") == 1:
        if "views" in config.model_fields_set:
            raise ConfigError(
                f"{store.path}: has the clean view alone; take --views clean, or dump again: "
                "pipeline dump-features … --views N --overwrite"
            )
        config = config.model_copy(update={"views": "clean"})
    _refuse_too_many(config, store)
    add_external_heads(config.method, store)
    penalty_of(config)  # refuses a wrong switch before the first fit
    heads = candidates(config)
    if needs_choice(config, heads) and config.select_on == "val" and not has_validation(store):
        raise ConfigError(
            f"{store.path}: no validation split to choose on; choose over folds of the training features with "
            "--select-on kfold, or give a single λ such as --lam 0.1"
        )
    chosen_on = config.select_on if needs_choice(config, heads) else None
    return FitPlan(config, tuple(references(config)) if with_references else (), tuple(heads), chosen_on)


def needs_choice(config: RebalanceConfig, heads: Sequence[HeadId] | None = None) -> bool:
    """Return true where a configuration asks for more than one head to choose among."""
    return len(candidates(config) if heads is None else heads) > 1 or is_comparison(config)


def describe_unmade(
    config: RebalanceConfig, *, out: Path, rows: int, classes: int, width: int, views: int, ranks: Ranks, state: str
) -> Prepared:
    """Return the description of a rebalance of a store that does not exist yet.

    Arguments:
        rows: training samples.
        width: features of a sample.
        state: one phrase on what is in `out` now.
    """
    plans = [
        FitPlan(single, () if config.variants else tuple(references(single)), tuple(candidates(single)), None)
        for single in variants_of(config)
    ]
    numbers = _numbers(plans, rows=rows, views=views)
    return Prepared(
        "rebalance",
        {"rebalance": config.model_dump(mode="json")},
        {"fits": _fits_text(plans, numbers), "on": device_text(ranks, "float32")},
        numbers | device_numbers(ranks, "float32"),
        (Write(out, _heads_bytes(numbers["heads"], classes=classes, width=width), state),),
    )


def network_of(store: Cache) -> dict[str, Any]:
    """Return the name, size and feature width of the network, as far as the store records them."""
    network = store.provenance.get("network")
    facts = dict(network) if isinstance(network, dict) else {}
    return {"network": store.fingerprint.get("network", "unknown")} | facts | {"feature_width": store.width}


def _refuse_too_many(config: RebalanceConfig, store: Cache) -> None:
    """Raise ConfigError where memory does not hold the heads of all λ and their answers."""
    samples = sum(store.rows(split) for split in store.splits if split != "train")
    parameters = len(store.counts) * (store.width + 1)
    bytes_of_lam = len(config.seeds) * (HEAD_BYTES + COPIES * 4 * parameters + samples)
    free, number = free_memory(), count_lam(config.lam)
    most = max(1, free // 2 // bytes_of_lam)
    if number > most:
        raise ConfigError(
            f"--lam {config.lam}: {number:,} λ in {len(config.seeds)} batch orders would take "
            f"{number * bytes_of_lam / 2**30:,.0f} GiB of memory for their heads, {free / 2**30:,.1f} are free; at most "
            f"{most:,} λ fit, such as --lam 0.01:1:log:{min(most, 32)}"
        )


def _numbers(plans: Sequence[FitPlan], *, rows: int, views: int) -> dict[str, Any]:
    """Return heads and steps of all plans in all batch orders; epochs, seeds and views of the first."""
    first = plans[0].config
    return {
        "heads": sum(plan.trained_heads for plan in plans),
        "heads_bound": " and ".join(dict.fromkeys(plan.bound for plan in plans if plan.bound)),
        "steps": sum(p.config.epochs * ceil(rows / p.config.batch_size) * len(p.config.seeds) for p in plans),
        "epochs": first.epochs,
        "seeds": list(first.seeds),
        "views": 1 if first.views == "clean" else views,
    }


def _fits_text(plans: Sequence[FitPlan], numbers: dict[str, Any]) -> str:
    config = plans[0].config
    methods = ", ".join(method_names(config.method)) if len(plans) == 1 else f"{len(plans)} variants"
    bound = f"{numbers['heads_bound']} " if numbers["heads_bound"] else ""
    tuned = f"; each trained method is tuned in at most {config.trials} trials" if is_comparison(config) else ""
    return (
        f"{methods}, λ {config.lam}: {bound}{numbers['heads']:,} heads in {len(config.seeds)} batch order(s), "
        f"{numbers['steps']:,} steps of {config.batch_size} features in {config.epochs} epochs{tuned}"
    )


def _heads_bytes(heads: int, *, classes: int, width: int) -> int:
    """Return the bytes of heads.safetensors at least, with the head that all start from; the other files are small."""
    return (heads + 1) * classes * (width + 1) * 4
