"""How an epoch's rows are dealt to ranks whose number does not divide them.

Every rank needs as many batches of one size.  accelerate (BatchSamplerShard, even_batches) fills the last
ones with the epoch's first rows, which are then trained on twice: with two ranks another loss than with one,
without a word.  Here the same places are filled with a row that has no targets, no weight and no tokens that
are counted, so that every row is trained on once an epoch on any number of ranks.
"""

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, Dataset, Sampler

from endprompt import Failure

FILLER = -1  # as an index: no row


class Rows(Dataset):
    """``rows`` by their indices, and for ``FILLER`` the first one, marked ``filler`` for the collator: a row
    like the others, since shifted attention and sequence parallelism take no other lengths."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[0], "filler": True} if index == FILLER else self.rows[index]


class WholeBatches(Sampler):
    """The batches of ``batch_sampler`` [batch_size], the last one filled up, and then as many of fillers
    alone as make their number a multiple of ``ranks``."""

    def __init__(self, batch_sampler: BatchSampler, ranks: int):
        self.batch_sampler, self.ranks = batch_sampler, ranks
        self.batch_size, self.drop_last = batch_sampler.batch_size, batch_sampler.drop_last

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self.ranks) * self.ranks

    def __iter__(self):
        missing = len(self)
        for batch in self.batch_sampler:
            yield batch + [FILLER] * (self.batch_size - len(batch))
            missing -= 1
        for _ in range(missing):
            yield [FILLER] * self.batch_size


def fill_evenly(loader, ranks: int) -> None:
    """Has accelerate's ``loader`` deal whole batches to all ``ranks``, fillers in place of its repeats.

    Nothing changes where one rank takes all batches, or where what is left over is dropped
    (``dataloader_drop_last``).
    Raises Failure if the batches are dealt otherwise than by accelerate's BatchSamplerShard.
    """
    if ranks == 1:
        return
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        raise Failure(
            f"train: {type(shard).__name__} deals the batches, and not accelerate's "
            "BatchSamplerShard; would rows be trained on twice?"
        )
    if not shard.drop_last:
        ranks = 1 if shard.split_batches else shard.num_processes
        shard.batch_sampler = WholeBatches(shard.batch_sampler, ranks)


def shared_micro_batches(rows: int, batch_size: int, ranks: int, group: int) -> int:
    """Micro-batches an epoch that hold a row on any rank, where ``group`` of ``ranks`` share rows.

    DeepSpeed's loader takes a batch from each rank and has the group work through them in turn, so that the
    last turns may be of fillers alone.
    """
    rounds, left = divmod(-(-rows // batch_size), ranks)
    return rounds * group + min(left, group)
