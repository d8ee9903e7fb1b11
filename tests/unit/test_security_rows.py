"""Hostile inputs, row by row: which tests show what becomes of each, and that they are there.

The rows are those of the threat model: M messages, T tensors, C configuration and deployment, W
weight files, H requests over HTTP. A row has the tests that show it and those that show the same
without the fault; where one test does both, it is named once. What does not apply has the reason.
"""

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

UNIT, WIRE, CLUSTER, MODEL = "tests/unit/", "tests/wire/", "tests/cluster/", "tests/model/"
API = "tests/api/"


def of(folder: str, module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}test_{module}.py::test_{name}" for name in names)


HOSTILE = of(
    WIRE, "hostile_peers", "whatever_a_peer_sends_is_counted_and_others_are_served"
)  # it sends what is right beside each row, too

ROWS: Mapping[str, tuple[str, ...]] = {
    "M1": (
        *of(WIRE, "transport", "strangers_are_served_nothing_and_disturb_nobody"),
        *of(WIRE, "keys", "what_strangers_send_takes_no_memory"),
        *of(CLUSTER, "soak", "noise_changes_no_token"),
    ),
    "M2": (
        *of(WIRE, "keys", "silent_connections_change_nothing_for_who_is_known"),
        *of(WIRE, "transport", "silent_connections_are_closed_and_serving_goes_on"),
    ),
    "M3": of(
        WIRE,
        "keys",
        "who_uses_no_keys_is_turned_away",
        "who_holds_the_right_keys_is_heard_and_known_by_its_key",
    ),
    "M4": (
        *of(WIRE, "keys", "who_has_no_admitted_key_is_turned_away"),
        *of(WIRE, "keys", "who_is_turned_away_is_told_why_and_what_to_do"),
        *of(CLUSTER, "keys", "this_machine_is_let_in_and_another_is_not_until_it_joins"),
    ),
    "M5": of(
        WIRE,
        "keys",
        "who_expects_another_coordinator_tells_it_nothing",
        "who_is_turned_away_is_told_why_and_what_to_do",
        "who_holds_the_right_keys_is_heard_and_known_by_its_key",
    ),
    "M6": (
        *of(WIRE, "keys", "nobody_is_admitted_while_nobody_says_who_may"),
        *of(WIRE, "keys", "nobody_is_admitted_when_nobody_can_say_who_may"),
        *of(
            WIRE,
            "internal_errors",
            "coordinator_ends_when_it_cannot_say_who_may_connect",
        ),
    ),
    "M7": (
        *of(UNIT, "core_access", "a_worker_may_not_say_that_it_is_another_machine"),
        *of(
            UNIT,
            "core_conduct",
            "who_takes_the_name_of_another_machine_is_quarantined_and_that_one_is_not",
        ),
        *of(UNIT, "access", "a_worker_may_not_take_the_name_of_another_machine"),
    ),
    "M8": (
        *of(WIRE, "keys", "who_takes_the_routing_id_of_another_gets_nothing_of_it"),
        *of(WIRE, "transport", "a_living_peer_cannot_be_replaced"),
    ),
    "M9": (
        *HOSTILE,
        *of(WIRE, "codec", "a_wrong_number_of_frames_is_refused", "a_wrong_magic_is_refused"),
    ),
    "M10": (*HOSTILE, *of(WIRE, "codec", "a_header_is_measured_before_it_is_decoded")),
    "M11": (*HOSTILE, *of(WIRE, "codec", "bombs_are_refused", "bombs_take_no_memory")),
    "M12": (*HOSTILE, *of(WIRE, "codec", "pickles_are_not_opened")),
    "M13": (
        *HOSTILE,
        *of(
            WIRE,
            "codec",
            "fields_are_neither_missing_nor_more",
            "of_a_repeated_key_only_the_last_counts_and_it_is_checked",
            "the_plain_heartbeat_is_read",
        ),
    ),
    "M14": (*HOSTILE, *of(WIRE, "codec", "another_version_is_named_whatever_its_header_is")),
    "M15": (
        *HOSTILE,
        *of(UNIT, "core", "strangers_are_told_to_connect_again"),
        *of(UNIT, "core", "workers_may_not_ask_and_clients_may_not_work"),
        *of(WIRE, "codec", "a_message_of_another_direction_is_refused"),
    ),
    "M16": (
        *of(UNIT, "core_messages", "results_of_an_older_epoch_are_dropped"),
        *of(UNIT, "core_access", "a_worker_may_not_end_the_session_of_another_process"),
    ),
    "M17": (
        *of(UNIT, "steps", "each_step_ends_once", "a_step_that_was_never_sent"),
        *of(UNIT, "steps", "other_workers_and_other_epochs"),
        *of(UNIT, "core_access", "tokens_that_another_machine_makes_up_are_not_taken"),
    ),
    "M18": of(WIRE, "transport", "a_frame_that_claims_too_much_ends_its_connection"),
    "M19": (
        *of(WIRE, "keys", "what_strangers_send_takes_no_memory"),
        *of(WIRE, "unfinished", "a_message_without_an_end_ends_its_connection"),
        *of(WIRE, "unfinished", "a_message_of_the_same_size_that_ends_is_delivered"),
    ),
    "M20": of(
        UNIT,
        "core_conduct",
        "a_flood_from_one_worker_is_bounded_and_quarantines_it",
        "one_that_beats_as_fast_as_it_may_is_no_flood",
    ),
    "M21": (
        *of(WIRE, "transport", "a_peer_that_never_reads_is_stuck_and_others_are_served"),
        *of(CLUSTER, "slow_reader", "client_that_never_reads_is_given_up_at_little_cost"),
    ),
    "M22": (
        *of(WIRE, "codec", "boasting_workers_are_refused"),
        *of(UNIT, "extremes", "whatever_a_worker_may_report_gives_forecasts"),
    ),
    "T1": (*HOSTILE, *of(WIRE, "codec", "dtypes_are_of_a_fixed_table")),
    "T2": (*HOSTILE, *of(WIRE, "codec", "a_frame_has_exactly_the_size_of_its_spec")),
    "T3": (*HOSTILE, *of(WIRE, "codec", "shapes_are_small_and_positive")),
    "T4": (
        *of(UNIT, "steps", "wrong_activations_break_the_step"),
        *of(UNIT, "steps", "wrong_token_ids_break_the_step"),
        *of(MODEL, "stage", "bad_hidden_states_are_refused"),
    ),
    "T5": of(
        MODEL,
        "stage",
        "bad_tasks_are_refused",
        "missing_positions_are_named_before_anything_is_touched",
        "a_slice_that_starts_earlier_forgets_what_came_after",
    ),
    "T6": of(UNIT, "request_book", "a_parameter_that_names_no_token_of_the_model_is_refused")
    + of(UNIT, "request_book", "a_prompt_with_no_token_of_the_model_is_refused"),
    "T7": (
        *of(MODEL, "finite_weights", "they_are_found_when_they_are_loaded"),
        *of(MODEL, "stage", "a_sequence_whose_numbers_are_not_finite_is_named"),
        *of(UNIT, "retries", "a_culprit_is_found_in_halves"),
    ),
    "T10": (
        *of(UNIT, "strategies", "custom_map_that_is_wrong"),
        *of(WIRE, "codec", "every_damaged_byte_is_refused_or_gives_a_message"),
    ),
    "T11": HOSTILE,
    "T12": (
        *of(WIRE, "codec", "a_received_tensor_keeps_its_bytes"),
        *of(UNIT, "engine", "tensor_owns_its_memory"),
    ),
    "C1": of(CLUSTER, "keys", "the_flag_alone_opens_no_port_to_others"),
    "C2": (
        *of(UNIT, "keyring", "a_file_that_others_may_use_is_refused"),
        *of(UNIT, "keyring", "only_its_user_may_read_the_file_and_the_folder"),
        *of(UNIT, "setup_scripts", "a_line_to_join_with_enrols_first_and_is_shown_nowhere"),
        *of(UNIT, "trust_store", "no_secret_is_printed"),
    ),
    "C3": of(UNIT, "config", "files_refused", "files_from_windows", "examples_are_valid"),
    "C4": (
        *of(UNIT, "config", "layer_maps_refused"),
        *of(UNIT, "strategies", "custom_map_that_is_wrong", "custom_is_followed"),
        *of(UNIT, "registry", "taken_names_get_a_number_and_free_ones_do_not"),
    ),
    "C5": (
        *of(WIRE, "codec", "another_version_is_named_whatever_its_header_is"),
        *of(CLUSTER, "commands", "a_worker_is_told_of_a_coordinator_of_another_protocol_version"),
    ),
    "C6": of(CLUSTER, "commands", "a_worker_with_other_weights_is_told_and_the_others_serve"),
    "C7": (
        *of(UNIT, "clocks", "no_decision_asks_what_time_of_day_it_is"),
        *of(UNIT, "clocks", "a_clock_that_steps_back_changes_nothing_for_who_is_enrolled"),
        *of(UNIT, "alarm", "a_time_without_the_loop_does_not_count"),
        *of(UNIT, "members", "a_token_expires"),
    ),
    "C9": (
        *of(UNIT, "keyring", "a_folder_that_cannot_be_written_is_told_with_what_to_do"),
        *of(UNIT, "trust_store", "a_folder_that_cannot_be_written_is_told"),
        *of(UNIT, "hub", "a_disk_that_takes_nothing"),
    ),
    "W1": (
        *of(UNIT, "hub", "only_pickles"),
        *of(UNIT, "wrong_models", "a_folder_in_another_format"),
        *of(UNIT, "source_rules", "nothing_forbidden_is_used"),
    ),
    "W2": of(
        UNIT,
        "wrong_models",
        "headers_that_cannot_be_right",
        "weights_that_are_cut_short",
        "weights_under_the_name_of_safetensors",
        "the_model_that_the_others_are_made_of_is_read",
    ),
    "W3": of(UNIT, "wrong_models", "headers_that_cannot_be_right"),
    "W4": of(MODEL, "finite_weights", "they_are_found_when_they_are_loaded"),
    "W5": of(
        MODEL,
        "weights",
        "a_missing_tensor_is_named",
        "a_tensor_of_another_shape_is_named",
        "stages_hold_their_weights_and_no_others",
    ),
    "W6": of(UNIT, "hub", "an_index_that_names_a_file_in_another_folder"),
    "W7": of(MODEL, "plan_of_config", "a_config_with_an_impossible_value"),
    "W8": (
        *of(UNIT, "tokenizer", "code_in_a_checkpoint_is_never_run"),
        *of(MODEL, "weights", "code_beside_a_model_that_transformers_has_is_never_run"),
    ),
    "W9": (
        *of(UNIT, "chat", "what_a_template_may_do_wrong"),
        *of(UNIT, "chat", "chat_is_rendered_and_encoded_as_transformers_does"),
        *of(WIRE, "text_service", "a_chat_template_that_never_ends_costs_one_request"),
    ),
    "W10": (
        *of(UNIT, "wrong_models", "what_changes_while_a_worker_reads_it"),
        *of(MODEL, "weights", "a_file_that_is_spoilt_after_its_header_was_read_is_named"),
        *of(UNIT, "hub", "an_interrupted_download_is_reported_and_taken_up_again"),
    ),
    "H1": of(
        API,
        "hostile",
        "every_route_needs_a_key",
        "the_word_before_a_key_may_be_written_as_one_likes",
    ),
    "H2": (
        *of(API, "hostile", "keys_that_are_no_text_are_unknown_keys"),
        *of(API, "keys", "who_asks_is_known_by_the_key"),
    ),
    "H3": (
        *of(API, "hostile", "a_body_that_is_too_large_is_not_read"),
        *of(API, "guard", "larger_bodies_are_refused_before_they_are_read"),
        *of(API, "guard", "a_body_may_be_as_large_as_it_may"),
    ),
    "H4": of(API, "hostile", "numbers_that_are_none", "numbers_that_are_unusual"),
    "H5": of(API, "hostile", "texts_that_are_unusual", "what_is_right_is_answered"),
    "H6": (
        *of(API, "hostile", "bodies_that_are_no_request", "what_is_right_is_answered"),
        *of(API, "hostile", "bodies_that_say_they_are_something_else"),
    ),
    "H7": of(API, "hostile", "values_out_of_range_are_named", "what_is_right_is_answered"),
    "H8": of(API, "hostile", "what_is_longer_than_the_context_is_told_with_both_numbers"),
    "H9": of(API, "hostile", "models_that_are_not_served", "what_is_right_is_answered"),
    "H10": of(
        API,
        "guard",
        "a_header_that_does_not_come_ends_its_connection",
        "a_body_that_does_not_come_is_not_waited_for",
        "half_a_request_does_not_hold_the_end_back",
    ),
    "H11": of(
        API,
        "guard",
        "idle_connections_make_room_for_new_ones",
        "connections_at_work_are_not_closed_for_new_ones",
        "who_is_too_many_is_told_at_once_and_the_others_end_well",
    ),
    "H12": of(
        API,
        "guard",
        "who_is_too_many_is_told_at_once_and_the_others_end_well",
        "a_key_has_its_share_and_others_are_served",
    ),
    "H13": of(API, "slow_readers", "who_reads_nothing_is_given_up_and_others_are_served"),
    "H14": (
        *of(API, "slow_readers", "who_leaves_ends_what_is_made_for_it"),
        *of(WIRE, "client", "leaving_a_stream_cancels_its_request_once"),
        *of(UNIT, "core_requests", "cancel_frees_every_stage"),
        *of(UNIT, "core_requests", "cancel_while_waiting_and_of_nothing"),
    ),
    "H15": (
        *of(API, "hostile", "pages_of_others_change_nothing", "nothing_is_changed_by_get"),
        *of(API, "guard", "other_names_are_refused", "our_names_and_all_addresses_are_answered"),
        *of(API, "guard", "bodies_that_are_no_json_are_refused"),
    ),
    "H16": of(API, "hostile", "what_would_have_to_be_fetched_is_refused"),
    "H17": of(API, "hostile", "fields_that_would_change_how_it_runs_are_not_used"),
    "H18": (
        *of(UNIT, "grammars", "a_grammar_that_takes_for_ever_or_ends_the_process_is_given_up"),
        *of(UNIT, "grammars", "compiled_grammars_are_kept_and_not_for_ever"),
        *of(UNIT, "grammars", "json_is_read_by_its_schema"),
    ),
    "H19": (
        *of(API, "operations", "only_admins_change_the_cluster"),
        *of(API, "metrics", "what_clients_send_makes_no_series"),
    ),
    "H20": (
        *of(API, "hostile", "neither_log_nor_command_line_has_prompts_or_keys"),
        *of(API, "guard", "a_request_is_one_line_without_what_it_says"),
        *of(API, "guard", "a_fault_is_told_by_its_id_and_its_message_is_not_logged"),
    ),
    "H22": (
        *of(API, "hostile", "nobody_sees_or_ends_the_requests_of_another_key"),
        *of(UNIT, "kv_ledger", "only_who_shares_with_each_other_shares_prefixes"),
    ),
    "H23": (
        *of(API, "hostile", "requests_that_mean_two_things"),
        *of(API, "guard", "headers_that_are_too_many_or_mean_two_things_are_refused"),
        *of(API, "guard", "what_is_no_http_is_refused_and_ends_its_connection"),
    ),
}

NOT_HERE: Mapping[str, str] = {
    "M23": "nothing is found by mDNS: a worker is told where its coordinator is, and by which key",
    "T8": "wrong numbers of the right form are not noticed; SECURITY.md says so",
    "T9": "nothing that is sent is compressed, so nothing inflates",
    "H21": "what a model answers is shown by the page, whose tests are in web/",
    "C8": "there are no manifests or images yet",
}

LENGTHS = {"M": 23, "T": 12, "C": 9, "W": 10, "H": 23}


@functools.cache
def defined(path: str) -> frozenset[str]:
    """Return the names of the tests in a module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(one.name for one in functions if one.name.startswith("test_"))


def missing(test: str) -> bool:
    path, _, name = test.partition("::")
    return not (ROOT / path).is_file() or name not in defined(path)


def test_every_row_is_shown_or_does_not_apply() -> None:
    every = {f"{kind}{number + 1}" for kind, count in LENGTHS.items() for number in range(count)}
    assert {*ROWS, *NOT_HERE} == every
    assert not ROWS.keys() & NOT_HERE.keys()


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row: str) -> None:
    assert ROWS[row]
    assert [test for test in ROWS[row] if missing(test)] == []


def test_the_tests_that_security_promises_exist() -> None:
    """It names modules, and tests of the module that it named last."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    module, named = "", 0
    for word in re.findall(r"`(tests/\S+?\.py|test_\w+)`", text):
        if word.endswith(".py"):
            module = word
            assert defined(module), f"{module} has no tests"
        else:
            assert not missing(f"{module}::{word}"), f"{module} has no {word}"
        named += 1
    assert named > 20


def test_what_is_missing_is_noticed() -> None:
    assert missing("tests/unit/test_security_rows.py::test_nothing_of_the_kind")
    assert missing("tests/unit/test_nowhere.py::test_a")
    assert not missing("tests/unit/test_security_rows.py::test_what_is_missing_is_noticed")
