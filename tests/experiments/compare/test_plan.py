"""Operations by hand, and budgets that are equal."""

import jax
import jax.numpy as jnp
import pytest

from experiments import flags
from experiments.compare import family
from experiments.compare.plan import make_plan
from experiments.compare.work import counted
from neuronet_jax.config import flatten
from neuronet_jax.errors import NeuronetError

TINY = ("--config.model.filters=4,8", "--config.data.crop=16", "--config.steps=1000")


def _counted(function, *shapes: tuple[int, ...]) -> float:
    return counted(jax.make_jaxpr(function)(*(jnp.zeros(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_a_product_counts_two_for_each_multiplication():
    assert _counted(lambda a, b: a @ b, (3, 4), (4, 5)) == 2 * 3 * 4 * 5


def test_a_convolution_counts_its_window_and_channels():
    def convolve(image, kernel):
        return jax.lax.conv(image, kernel, (1, 1), "SAME")  # [b c x y], [f c i j]

    assert _counted(convolve, (2, 3, 8, 8), (5, 3, 3, 3)) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def test_a_loop_counts_as_often_as_it_runs_and_a_conditional_once():
    def loop(a):
        return jax.lax.scan(lambda carry, _: (carry @ a, None), a, None, length=7)[0]

    assert _counted(loop, (4, 4)) == 7 * 2 * 4**3

    def either(a):
        return jax.lax.cond(a[0, 0] > 0, lambda x: x @ x, lambda x: x, a)

    assert _counted(either, (4, 4)) == pytest.approx(2 * 4**3, abs=5)  # and the condition


def test_equal_compute_shares_out_the_cost_of_the_joint_network():
    singles = ("fsl_fast:demo", "fsl_first:demo", "spm_tissue:demo", "malp_em:demo", "malp_em_tissue:demo")
    plan = make_plan(("all_targets:demo", *singles), ("neuronet",), ("crops", "compute"), 2, TINY)
    cost = {(arm.budget, arm.variant): arm.steps * arm.operations for arm in plan.arms}
    joint = cost["compute", "all_targets:demo"]
    assert joint == cost["crops", "all_targets:demo"]
    assert sum(cost["compute", name] for name in singles) == pytest.approx(joint, rel=0.01)
    assert sum(cost["crops", name] for name in singles) > 1.1 * joint
    assert {arm.steps for arm in plan.arms if arm.budget == "crops"} == {1000}
    names = [cell.name for cell in plan.cells()]
    assert len(names) == len(set(names)) == 2 * (6 + 5)  # the joint network of both budgets is one
    assert all(name.endswith("seed-0") for name in names[:11])  # all arms before the next seed


def test_equal_compute_needs_a_network_of_all_protocols():
    with pytest.raises(NeuronetError, match="add a variant with fsl_fast, fsl_first"):
        make_plan(("fsl_fast:demo", "fsl_first:demo"), ("neuronet",), ("compute",), 1, TINY)


def test_every_variant_of_the_family_changes_one_setting():
    def settings(variant: str) -> dict:
        fields = flags.load(f"{family.__file__}:{variant}").to_fields()
        return {name: value for name, value in flatten(fields).items() if name != "name"}

    plain = settings("plain")
    changes = [{k for k, v in settings(name).items() if v != plain[k]} for name in family.CHANGES if name != "plain"]
    assert [len(changed) for changed in changes] == [1] * (len(family.CHANGES) - 1)
