"""What the public doors refuse, and in which words."""

import warnings

import pytest
import torch

from pyrogen.inputs import check_batch, check_context, check_varied


@pytest.mark.parametrize("event_shape", [(), (2,), (3, 2)])
@pytest.mark.parametrize("batch", [(1,), (5,), (4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_good_batches_pass(event_shape, batch, dtype):
    x = torch.zeros(*batch, *event_shape, dtype=dtype)
    assert check_batch(x, event_shape, owner="Flow", like=x) is None


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[0.0, 1.0]], TypeError, r"Flow expected a tensor, got list\. Convert it by torch\.as_t"),
        (torch.zeros(5, 2).long(), TypeError, r"floating-point data, got torch\.int64.*x\.float"),
        (torch.zeros(5, 2).bool(), TypeError, r"got torch\.bool"),
        (torch.zeros(5, 2).cfloat(), TypeError, r"got torch\.complex64"),
        (torch.zeros(5, 3), ValueError, r"shape \(\*batch, 2\), got \(5, 3\)\. Reshape"),
        (torch.zeros(2), ValueError, r"shape \(\*batch, 2\), got \(2,\)"),
        (torch.zeros(()), ValueError, r"got \(\)"),
        (torch.zeros(0, 2), ValueError, r"at least 1 data, got 0\. Pass a larger batch"),
        (torch.zeros(3, 0, 2), ValueError, "at least 1 data, got 0"),
        (torch.tensor([[0.0, torch.nan]]), ValueError, r"finite data, got 1 NaN.*impute"),
        (torch.tensor([[torch.inf, -torch.inf]]), ValueError, "got 2 NaN or infinite"),
    ],
)
def test_bad_batches_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        check_batch(x, (2,), owner="Flow")


def test_event_shape_is_matched_from_the_right():
    check_batch(torch.zeros(7, 3, 2), (3, 2), owner="Flow")
    with pytest.raises(ValueError, match=r"shape \(\*batch, 3, 2\), got \(3, 2\)"):
        check_batch(torch.zeros(3, 2), (3, 2), owner="Flow")
    with pytest.raises(ValueError, match=r"got \(7, 2, 3\)"):
        check_batch(torch.zeros(7, 2, 3), (3, 2), owner="Flow")
    with pytest.raises(ValueError, match=r"shape \(\*batch\), got \(\)"):
        check_batch(torch.zeros(()), (), owner="Flow")


def test_all_batch_dimensions_count_as_data():
    check_batch(torch.zeros(1, 2, 3), (3,), owner="Flow", at_least=2)
    with pytest.raises(ValueError, match=r"needs at least 2 data, got 1"):
        check_batch(torch.zeros(1, 1, 3), (3,), owner="Flow", at_least=2)


def test_dtype_and_device_are_the_owners():
    like = torch.zeros(3)
    with pytest.raises(ValueError, match=r"holds torch\.float32, got data of torch\.float64"):
        check_batch(torch.zeros(5, 2).double(), (2,), owner="Flow", like=like)
    with pytest.raises(ValueError, match=r"lives on cpu, got data on meta.*x\.to\(device\)"):
        check_batch(torch.zeros(5, 2, device="meta"), (2,), owner="Flow", like=like)


def test_values_are_read_on_the_cpu_only():
    check_batch(torch.zeros(5, 2, device="meta"), (2,), owner="Flow")  # has no values to read


@pytest.mark.parametrize(
    ("context", "features", "got"),
    [(None, 3, 0), (torch.zeros(5, 2), 3, 2), (torch.zeros(5, 2), 0, 2), (torch.zeros(()), 3, 0)],
)
def test_wrong_context_is_refused(context, features, got):
    message = rf"Flow was built with context={features}, got {got} context features.*the flow\."
    with pytest.raises(ValueError, match=message):
        check_context(context, features, owner="Flow")


def test_right_context_passes():
    check_context(None, 0, owner="Flow")
    check_context(torch.zeros(3), 3, owner="Flow")
    check_context(torch.zeros(2, 5, 3), 3, owner="Flow")


def test_scalar_is_no_context_of_width_zero():
    with pytest.raises(ValueError, match="context=0"):
        check_context(torch.zeros(()), 0, owner="Flow")


def test_constant_features_are_counted_and_the_first_is_named():
    x = torch.randn(5, 2, 2)
    check_varied(x, owner="Flow")
    x[:, 0, 1] = 7
    x[:, 1, 1] = 0
    with pytest.raises(ValueError, match=r"got 2 constant \(first: 1\)\. Drop them"):
        check_varied(x, owner="Flow")
    with pytest.raises(ValueError, match=r"got 4 constant"):
        check_varied(torch.randn(1, 2, 2), owner="Flow")


def test_one_value_apart_is_enough_to_vary():
    x = torch.zeros(5, 1)
    x[3] = 1e-30
    check_varied(x, owner="Flow")


def test_scalar_data_have_one_feature():
    check_varied(torch.tensor([[0.0], [1.0]]), owner="Flow")
    with pytest.raises(ValueError, match="got 1 constant"):
        check_varied(torch.zeros(4, 1), owner="Flow")


def test_checks_change_no_data_and_warn_of_nothing():
    x = torch.randn(5, 2)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_batch(x, (2,), owner="Flow", like=x, at_least=2)
        check_varied(x, owner="Flow")
    assert torch.equal(x, before)
