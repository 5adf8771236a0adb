"""Faults that were found from outside, by kind, and the tests that state the right outcome of each.

A kind is mended once it holds for siblings that nobody has reported; so most of these tests have several cases.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from lightning_sparse import DST, FGGP, GMP, RigL, SparseMethod
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TESTS = Path(__file__).parent

_GUARD, _WRITERS, _WATCHING = "methods/test_guard.py", "methods/test_writers.py", "methods/test_watching.py"
_PLAN, _REPORT, _FIXED = "masks/test_plan.py", "test_reporting.py", "methods/test_fixed_mask.py"
_HOSTILE, _STATE, _MONITOR = "masks/test_hostile_files.py", "methods/test_state.py", "test_monitor.py"

FAULTS: dict[str, tuple[str, Sequence[tuple[str, str]]]] = {
    # A. Zeros that are held by assumption.
    "A1": (
        "gradients are edited after the method",
        [
            (_GUARD, "gradients_that_the_module_edits_after_us"),
            (_GUARD, "gradients_that_a_later_callback_edits"),
            (_GUARD, "it_is_said_once_with_the_cause_and_the_moments_are_clear"),
            (_WRITERS, "zeros_hold"),
        ],
    ),
    "A2": (
        "optimizers are replaced in mid-training",
        [
            (_GUARD, "an_optimizer_that_takes_the_place_of_another"),
            (_GUARD, "parameters_and_their_optimizer_that_are_replaced_at_once"),
            (_WRITERS, "zeros_hold"),
        ],
    ),
    "A3": (
        "weights are written between steps, around them, before a forward, past autograd's counters",
        [
            (_GUARD, "weights_that_the_module_writes_in_a_hook"),
            (_GUARD, "weights_that_are_written_around_a_step"),
            (_GUARD, "a_latent_method_trains_from_what_was_loaded"),
            (_WATCHING, "who_writes_before_a_forward_is_caught_by_the_first_and_told_of_once"),
            (_WATCHING, "one_write_past_the_counters_is_found_before_the_next_forward"),
            (_WATCHING, "what_comes_into_a_checkpoint_after_us_is_told"),
        ],
    ),
    "A4": ("channels_last after masks exist", [(_GUARD, "weights_that_change_their_order_in_memory")]),
    "A5": (
        "ties by storage",
        [
            (_PLAN, "two_parameters_in_one_memory_are_refused_with_the_remedy"),
            (_GUARD, "layers_that_are_tied_later_have_one_mask"),
            (_GUARD, "layers_that_are_tied_later_by_their_memory_are_refused"),
        ],
    ),
    "A6": (
        "averages: of one's own, AveragedModel, schedule-free",
        [
            (_GUARD, "an_average_of_ones_own_is_sparse_wherever_it_is_evaluated"),
            (_GUARD, "an_average_that_the_module_keeps_is_sparse"),
            (_GUARD, "an_averaged_model_within_the_module_is_sparse"),
            (_GUARD, "an_average_may_put_other_parameters_in_place"),
            ("test_hosts.py", "averages_come_before_and_after_what_changes_the_module"),
            (_WRITERS, "zeros_hold"),
        ],
    ),
    "A7": ("a layer is replaced", [(_GUARD, "a_layer_of_another_shape_is_masked_anew")]),
    "A8": (
        "validating or saving changes a latent method's training",
        [("methods/test_latent_family.py", "validating_or_saving_at_every_step_changes_no_training")],
    ),
    "A9": (
        "nested Trainers, re-registered parameters",
        [(_GUARD, "a_fit_within_a_fit_is_refused"), (_GUARD, "a_parameter_of_the_same_shape_takes_over_the_mask")],
    ),
    # B. State that outlives its weights.
    "B1": ("folds", [(_GUARD, "a_module_that_is_set_back_is_trained_anew")]),
    "B2": ("a second fit", [(_GUARD, "a_second_training_explores_again")]),
    "B3": (
        "masks saved after other weights were loaded",
        [
            (_WATCHING, "masks_after_a_test_of_the_best_are_those_of_the_best"),
            (_WATCHING, "masks_are_not_saved_beside_weights_that_were_written_since"),
        ],
    ),
    "B4": (
        "FixedMask on weights of unknown modules",
        [
            (_FIXED, "masks_that_are_given_are_laid_on_dense_weights"),
            (_FIXED, "a_given_mask_of_a_frozen_layer_is_honoured_whatever_its_zeros"),
            (_FIXED, "masks_that_are_given_of_unknown_modules_are_held"),
            (_FIXED, "zeros_of_unknown_modules_without_masks_are_told_with_counts"),
        ],
    ),
    "B5": ("the monitor's history", [(_MONITOR, "a_checkpoint_before_the_first_resumed_batch_has_the_history")]),
    "B6": ("a refused fit has masked", [(_GUARD, "a_fit_that_one_method_refuses_leaves_all_as_it_was")]),
    "B7": ("blame on a checkpoint", [(_STATE, "a_layer_that_was_added_since_is_not_blamed_on_a_checkpoint")]),
    # C. What is masked.
    "C1": (
        "a type admits its own weights",
        [("masks/test_selectors.py", "the_name_of_a_type_admits_that_types_weights_alone")],
    ),
    "C2": (
        "layers by class name",
        [
            ("masks/test_layers.py", "a_class_is_judged_by_what_it_comes_from"),
            ("masks/test_layers.py", "a_name_alone_makes_no_layer"),
        ],
    ),
    "C3": (
        "a forward of its own",
        [("masks/test_forwards.py", "a_layer_that_computes_with_other_weights_stays_dense")],
    ),
    "C4": (
        "unknown modules and fused experts",
        [
            ("masks/test_remarks.py", "a_large_share_of_unknown_modules_is_told_with_counts_and_names"),
            ("masks/test_layers.py", "experts_are_masked_and_their_routers_and_biases_are_not"),
            ("masks/test_layers.py", "erk_gives_a_stack_what_its_experts_would_have"),
            ("masks/test_layers.py", "dst_has_a_threshold_for_each_neuron_of_each_expert"),
        ],
    ),
    "C5": (
        "patterns that do nothing",
        [
            ("masks/test_remarks.py", "a_pattern_that_masks_nothing_is_told_with_the_reason"),
            ("masks/test_selectors.py", "the_pattern_that_is_advised_for_a_module_works"),
            (_PLAN, "a_tied_weight_included_by_its_second_name_is_masked"),
        ],
    ),
    "C6": (
        "refusals before exclude= is read",
        [
            (_PLAN, "a_lazy_layer_that_is_left_out_is_no_refusal"),
            (_PLAN, "an_empty_parameter_is_no_weight"),
            (_REPORT, "a_layer_without_a_shape_is_passed_over"),
        ],
    ),
    "C7": (
        "depthwise filters; traits",
        [
            ("methods/test_logging.py", "depthwise_filters_that_die_are_told_with_counts"),
            ("masks/test_selectors.py", "traits_select_in_include_and_exclude"),
        ],
    ),
    "C8": (
        "report",
        [
            (_REPORT, "what_was_pruned_and_loaded_is_counted_whatever_its_module_is"),
            (_REPORT, "a_report_tells_what_is_masked_from_the_rest"),
            (_REPORT, "patterns_say_what_is_counted"),
        ],
    ),
    "C9": (
        "weight norm",
        [("masks/test_remarks.py", "the_direction_of_a_weight_norm_that_is_named_is_masked_with_the_danger_told")],
    ),
    # D. Clocks.
    "D1": (
        "SWA's epoch for BatchNorm",
        [("methods/test_gmp.py", "the_epoch_that_averaging_adds_for_batch_norm_has_no_steps")],
    ),
    "D2": (
        "a generator stepped every fifth batch",
        [
            ("methods/test_gmp.py", "the_clock_counts_batches_where_another_optimizer_steps_oftener"),
            ("test_real_modules.py", "fractions_of_a_training_that_steps_seldom_are_told_and_steps_are_exact"),
        ],
    ),
    "D3": (
        "an update every step in short runs",
        [("test_faults.py", "defaults_leave_ten_steps_between_updates_in_short_runs")],
    ),
    # E. Several processes.
    "E1": (
        "masks and weights that differ",
        [
            ("methods/test_contract.py", "ranks_that_disagree_are_an_error_that_names_the_layer"),
            ("masks/test_distributed.py", "a_vote_on_masks_that_differ_names_the_layer"),
            ("masks/test_distributed.py", "weights_that_differ_are_named"),
            ("methods/test_ranks.py", "fixed_masks_that_differ_are_an_error"),
        ],
    ),
    "E2": (
        "times, patterns and gradients that differ",
        [
            ("methods/test_ranks.py", "arguments_that_differ_are_an_error_that_names_them"),
            ("methods/test_ranks.py", "gradients_that_one_process_lacks_are_an_error_that_names_them"),
            ("methods/test_ranks.py", "a_latent_method_finds_them_by_masks_that_differ"),
            ("methods/test_ranks.py", "fixed_masks_find_them_by_weights_that_differ"),
        ],
    ),
    "E3": ("a sparsity that differs", [("methods/test_ranks.py", "a_sparsity_that_differs_is_an_error")]),
    # F. Files and states.
    "F1": (
        "small files of terabytes",
        [
            (_HOSTILE, "weights_that_claim_terabytes_are_refused"),
            (_HOSTILE, "masks_that_claim_terabytes_are_refused"),
            (_HOSTILE, "a_name_alone_takes_no_memory_for_a_dynamic_relu"),
            (_REPORT, "a_small_file_of_terabytes_is_refused"),
        ],
    ),
    "F2": (
        "mutated states",
        [
            (_STATE, "mutated_states_are_refused_or_harmless"),
            (_STATE, "mutated_states_of_other_callbacks_are_refused_or_harmless"),
            (_STATE, "a_field_that_cannot_be_is_told_in_a_sentence"),
        ],
    ),
    "F3": (
        "flipped bits",
        [
            (_HOSTILE, "every_bit_of_a_file_of_masks_counts"),
            (_HOSTILE, "flipped_bits_in_a_checkpoint_are_refused_or_change_no_mask"),
            (_STATE, "a_flipped_bit_in_the_masks_is_refused_wherever_they_are_read"),
        ],
    ),
    "F4": (
        "raw errors of readers",
        [
            (_HOSTILE, "a_state_of_another_form_is_refused_in_words"),
            (_HOSTILE, "what_holds_no_state_gives_no_masks_and_no_state_dict"),
            (_HOSTILE, "narrow_floats_are_weights_like_others"),
        ],
    ),
    "F5": (
        "modes, links, full disks, missing folders",
        [
            ("test_atomic.py", "a_file_keeps_its_mode"),
            ("test_atomic.py", "a_link_leads_to_the_new_file"),
            ("test_atomic.py", "a_full_disk_is_told_and_the_old_file_stays"),
            ("test_atomic.py", "a_missing_folder_is_told"),
        ],
    ),
    "F6": ("a mask file without masks", [(_HOSTILE, "a_file_of_masks_without_any_is_refused")]),
    "F7": (
        "escape sequences in names",
        [
            (_HOSTILE, "control_characters_in_names_do_nothing"),
            (_REPORT, "names_with_escape_sequences_do_not_reach_the_terminal"),
        ],
    ),
    "F8": (
        "arguments of wrong types",
        [
            ("test_arguments.py", "what_is_no_whole_number_is_refused_at_once"),
            ("test_arguments.py", "a_billion_cycles_are_refused_and_not_counted"),
        ],
    ),
    "F9": (
        "weights in safetensors",
        [
            (_HOSTILE, "weights_in_the_safetensors_format_are_understood"),
            (_REPORT, "weights_in_safetensors_are_counted_and_masks_are_not"),
        ],
    ),
    "F10": (
        "prefixes of wrappers",
        [
            ("masks/test_wrappers.py", "masks_of_a_wrapped_module_are_written_under_its_own_names"),
            ("masks/test_wrappers.py", "weights_of_a_wrapped_module_are_understood"),
        ],
    ),
    # G. Hosts and optimizers.
    "G1": (
        "optimizers without hooks, and around others",
        [
            (_WRITERS, "zeros_hold_under_an_optimizer_that_wraps_another"),
            (_WRITERS, "thresholds_of_weights_in_a_wrapped_optimizer_are_refused_in_words"),
            ("masks/test_moments.py", "moments_of_an_optimizer_that_is_wrapped_are_cleared"),
        ],
    ),
    "G2": ("a compiled step", [("methods/test_latent_family.py", "a_compiled_optimizer_step_is_the_plain_one")]),
    "G3": ("gradients with a graph", [(_GUARD, "an_optimizer_that_differentiates_gradients_trains")]),
    "G4": (
        "sparse gradients",
        [
            (_PLAN, "an_embedding_with_sparse_gradients_is_refused_where_it_would_be_masked"),
            ("methods/test_latent_family.py", "sparse_gradients_are_taken_as_dense_ones"),
        ],
    ),
    "G5": (
        "a step that ignores its closure",
        [(_WRITERS, "an_optimizer_that_ignores_its_closure_is_refused_with_what_helps")],
    ),
    "G6": (
        "pytorch_lightning",
        [("test_hosts.py", "every_method_trains_alike"), ("test_hosts.py", "a_denser_best_checkpoint_is_told")],
    ),
    "G7": ("Fabric", [("test_hosts.py", "fabric_is_refused_in_words")]),
    "G8": ("detectors", [("test_hosts.py", "east_phases_a_detector")]),
    # H. What is logged and said.
    "H1": ("keys that are folders", [("methods/test_logging.py", "no_key_is_the_folder_of_another")]),
    "H2": (
        "keys of others",
        [
            ("methods/test_logging.py", "a_sparsity_of_the_users_own_is_told"),
            ("methods/test_logging.py", "two_methods_of_a_class_have_keys_of_their_own"),
        ],
    ),
    "H3": (
        "operators without a formula",
        [
            ("metrics/test_operators.py", "are_warned_of_by_name_and_once"),
            ("metrics/test_operators.py", "experts_count_for_their_stack"),
        ],
    ),
    "H4": ("a warning for each layer, long lines", [("test_faults.py", "many_layers_are_told_of_in_few_short_lines")]),
    "H5": ("false warnings on LoRA", [("methods/test_dst.py", "a_layer_that_begins_at_zero_is_trained_in_silence")]),
    "H6": ("of all parameters", [(_PLAN, "coverage_is_the_share_of_all_matrices_that_is_masked")]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_tests(fault: str) -> None:
    _, tests = FAULTS[fault]
    for file, name in tests:
        assert re.search(rf"def test_{name}\(", (TESTS / file).read_text()), (file, name)


DEFAULTS: list[Callable[[], SparseMethod]] = [lambda: GMP(0.8), lambda: FGGP(0.8), lambda: RigL(0.8)]


@pytest.mark.parametrize("make", DEFAULTS)
@pytest.mark.parametrize("steps", [60, 120])
def test_defaults_leave_ten_steps_between_updates_in_short_runs(
    make: Callable[[], SparseMethod], steps: int, tmp_path: Path
) -> None:
    method = make()
    make_trainer(tmp_path, callbacks=[method], max_epochs=-1, max_steps=steps).fit(ToyModel())
    assert 0 < method.registry.num_updates <= steps // 10 + 1
    assert method.registry.sparsity == pytest.approx(0.8, abs=0.01)


class Deep(ToyModel):
    """Thirty layers of eight neurons: at high sparsities most of them die."""

    @staticmethod
    def build() -> nn.Sequential:
        layers: list[nn.Module] = [nn.Linear(12, 8), nn.ReLU()]
        for _ in range(28):
            layers += [nn.Linear(8, 8), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(8, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DST(0.09),
        lambda: GMP(0.97, allocation="uniform", update_every=4, stop=11),
        lambda: RigL(0.95, update_every=4, stop=11),
    ],
    ids=["dst", "gmp", "rigl"],
)
def test_many_layers_are_told_of_in_few_short_lines(make: Callable[[], Any], tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = make()
        make_trainer(tmp_path, callbacks=[method], max_epochs=4).fit(Deep())
    said = [str(one.message) for one in caught if str(one.message).startswith(type(method).__name__)]
    assert 1 <= len(said) <= 4
    assert max(map(len, said)) <= 280
