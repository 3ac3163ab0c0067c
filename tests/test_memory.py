"As many images at once as memory holds."

import pytest
import torch

from diffii.base.files import UserError
from diffii.base.memory import even_slices, out_of_memory, run_slices, until_it_fits
from diffii.base.pipeline import Pipeline, load_pipeline


class SmallMemory:
    "Does the items of a slice where there are few enough; remembers what was tried."

    def __init__(self, limit=6):
        self.limit, self.tried = limit, []

    def __call__(self, part):
        size = part.stop - part.start
        self.tried.append(size)
        if size > self.limit:
            raise torch.cuda.OutOfMemoryError()
        return list(range(part.start, part.stop))


@pytest.fixture
def no_model():
    "A pipeline without a model, with room for 64 images as far as it knows."
    return Pipeline(None, 'none', 32)


@pytest.mark.parametrize(
    'n, at_most, sizes',
    [(0, 8, []), (10, 8, [5, 5]), (17, 8, [6, 6, 5]), (3, 1, [1] * 3), (3, 0, [1] * 3)],
)
def test_slices_are_even(n, at_most, sizes):
    slices = even_slices(n, at_most)

    assert [part.stop - part.start for part in slices] == sizes


def test_a_job_is_done_in_halves_where_memory_runs_out(no_model):
    work = SmallMemory()

    with pytest.warns(UserWarning) as caught:
        got = no_model.in_parts(work, 20)

    assert sum(got, []) == list(range(20))
    assert work.tried == [20, 10] + [5] * 4
    message = 'memory ran out with 64 images at a time; 5 from here on'
    assert [str(w.message) for w in caught] == [message]


@pytest.mark.filterwarnings('ignore:memory ran out')
def test_what_fits_is_kept_and_the_batch_size_stays(no_model):
    no_model.in_parts(SmallMemory(), 20)
    work = SmallMemory()

    no_model.in_parts(work, 8)
    no_model.in_parts(work, 4, per=2)

    assert work.tried == [4, 4, 2, 2]
    assert (no_model.micro_batch, no_model.batch_size) == (5, 64)


def test_one_image_that_does_not_fit_ends_it(no_model):
    with pytest.raises(UserError, match='one image at a time.*--dtype float16'):
        no_model.in_parts(SmallMemory(limit=0), 20)


def test_torch_says_that_memory_ran_out(no_model):
    def ask_for_a_petabyte(part):
        torch.empty(2**50)

    with pytest.raises(UserError, match='one image at a time'):
        no_model.in_parts(ask_for_a_petabyte, 4)


@pytest.mark.parametrize(
    'message, ran_out',
    [
        ('CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA', True),
        ('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate', True),
        ('CUDA error: an illegal memory access was encountered', False),
    ],
)
def test_cuda_says_in_its_own_words_that_memory_ran_out(message, ran_out):
    assert out_of_memory(RuntimeError(message)) == ran_out


def test_other_errors_pass(no_model):
    with pytest.raises(RuntimeError, match='must match'):
        no_model.in_parts(lambda part: torch.ones(2) + torch.ones(3), 4)


def test_the_number_in_force_is_known_inside_the_job(no_model):
    "Guidance asks it, to put both questions into one call or into two."
    seen = []

    def work(part):
        seen.append(no_model.micro_batch)
        if no_model.micro_batch > 1:
            raise MemoryError

    with pytest.warns(UserWarning, match='64 images at a time; 1 from'):
        no_model.in_parts(work, 4)

    assert seen == [64, 2, 1, 1, 1, 1]


def test_a_job_that_fits_is_tried_once():
    tried = []

    assert until_it_fits(tried.append, at_most=8, images=20) is None
    assert tried == [8]


# ---- slices side by side


@pytest.fixture
def two_threads():
    "Two threads for torch, as on a small machine."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_slices_side_by_side_share_the_threads(two_threads):
    pipe = load_pipeline('tiny', device='cpu', batch_size=8)

    def describe(part):
        size = part.stop - part.start
        return size, torch.is_inference_mode_enabled(), torch.get_num_threads()

    got = pipe.in_parts(describe, 15, side_by_side=True)

    assert got == [(8, True, 1), (7, True, 1)]
    assert torch.get_num_threads() == 2


def test_an_error_side_by_side_gives_the_threads_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        run_slices(lambda part: 1 / (part.start - 8), even_slices(15, 8), 2)

    assert torch.get_num_threads() == 2
