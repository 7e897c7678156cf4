"""Batches: padding, responses read as if alone, epochs, examples of equal length."""

import numpy as np

from data.batch import (
    BatchSchedule,
    Example,
    collate,
    epoch_batches,
    length_batches,
    map_examples,
)


def example_of(prompt, *responses):
    """An Example of random tokens with these lengths."""
    rng = np.random.default_rng([prompt, *responses])
    parts = [rng.integers(1, 49, length) for length in (prompt, *responses)]
    return Example(parts[0], tuple(parts[1:]))


def test_collate_places_every_token():
    examples = [example_of(2, 3, 1), example_of(4, 1, 2), example_of(1, 0, 3)]
    batch = collate(examples)
    assert batch.tokens.shape == (3, 7) and batch.mask.shape == (6, 3)
    flat = batch.tokens.flatten()
    for number in (0, 1):
        for row, example in enumerate(examples):
            response = example.responses[number]
            mask = batch.mask[number * 3 + row]
            positions = batch.response_positions[number * 3 + row][mask]
            previous = batch.previous_positions[number * 3 + row][mask]
            assert flat[positions].tolist() == response.tolist()
            before = [example.prompt[-1], *response[:-1]][: len(response)]
            assert flat[previous].tolist() == before
            expected = len(example.prompt) + np.arange(len(response))
            assert batch.positions.flatten()[positions].tolist() == expected.tolist()
            assert set(batch.segments.flatten()[positions].tolist()) <= {number + 1}


def test_an_epoch_has_every_example_at_most_once_and_depends_on_its_arguments():
    lengths = np.random.default_rng(0).integers(5, 500, 103)
    batches = epoch_batches(lengths, 8, seed=1, epoch=2)
    numbers = np.concatenate(batches)
    assert len(batches) == 12 and len(set(numbers.tolist())) == 96
    again = np.concatenate(epoch_batches(lengths, 8, seed=1, epoch=2))
    assert np.array_equal(numbers, again)
    for seed, epoch in ((2, 2), (1, 3)):
        other = np.concatenate(epoch_batches(lengths, 8, seed, epoch))
        assert not np.array_equal(numbers, other)


def test_a_batch_holds_examples_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 500, 4096)
    padded = sum(
        len(batch) * lengths[batch].max() for batch in epoch_batches(lengths, 16, 0, 0)
    )
    assert padded < 1.06 * lengths.sum()


def test_a_small_dataset_is_one_batch_in_every_step():
    schedule = BatchSchedule(np.array([3, 5, 4]), batch_size=8, seed=0)
    for step in range(4):
        assert sorted(schedule[step].tolist()) == [0, 1, 2]


def test_a_schedule_can_start_at_any_step():
    lengths = np.random.default_rng(0).integers(5, 50, 30)
    in_order = BatchSchedule(lengths, 4, seed=3)
    batches = [in_order[step] for step in range(20)]
    for step in (19, 0, 8, 7):
        fresh = BatchSchedule(lengths, 4, seed=3)
        assert np.array_equal(fresh[step], batches[step])


def test_examples_are_grouped_by_number_of_responses_and_by_length():
    examples = [example_of(*lengths) for lengths in [(3, 2), (9, 9), (3, 1), (2, 2, 2)]]
    groups = list(length_batches(examples, max_tokens=10))
    assert sorted(sum(groups, [])) == [0, 1, 2, 3]
    assert groups == [[2, 0], [1], [3]]


def test_values_come_back_in_the_order_of_examples_and_responses():
    shapes = [(3, 2), (2, 4, 1), (1, 5), (4, 0, 3), (6,)]
    examples = [example_of(*lengths) for lengths in shapes]

    def first_tokens(batch):
        flat, values = batch.tokens.flatten(), []
        for positions, mask in zip(batch.response_positions, batch.mask):
            values.append(flat[positions][mask].tolist())
        return values

    for max_tokens in (1, 12, 1000):
        values = map_examples(examples, first_tokens, max_tokens)
        for example, responses in zip(examples, values, strict=True):
            expected = [response.tolist() for response in example.responses]
            assert responses == expected
