"""What tests of data modules note of the batches that a training saw."""

import lightning.pytorch as pl


class Seen(pl.Callback):
    """Keeps a fingerprint of every training batch, by epoch; stops after some."""

    def __init__(self, stop_after=None):
        self.batches = []
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, float(batch[0].sum()), len(batch[1])))
        if len(self.batches) == self.stop_after:
            trainer.save_checkpoint(trainer.default_root_dir + "/middle.ckpt")
            trainer.should_stop = True
