"""log.txt's figures for TensorBoard."""
import os
import shutil

GROUPS = (
    ("loss", ("train_loss", "test_loss", "test_ema_loss")),
    ("accuracy", ("test_acc1", "test_acc5", "test_ema_acc1")),
    ("images_per_s", ("train_images_per_s", "test_images_per_s")),
    ("schedule", ("train_lr", "loss_scale")),
    ("time", ("seconds", "train_seconds", "waiting_for_data", "mfu")),
    ("memory", ("peak_memory_mb",)))


class Scalars:
    """Writes each epoch's figures to the folder DIR/tensorboard. It starts anew with the epochs in `log`, so that a
    resumed run leaves nothing of what an interrupted one wrote after its checkpoint."""

    def __init__(self, output_dir, log):
        from torch.utils.tensorboard import SummaryWriter
        folder = os.path.join(output_dir, "tensorboard")
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(folder)
        for entry in log:
            self.write(entry)

    def write(self, entry):
        """An epoch's line of log.txt."""
        for group, names in GROUPS:
            for name in names:
                if name in entry:
                    self.writer.add_scalar("{}/{}".format(group, name), entry[name], entry["epoch"])
        for stage, ratio in enumerate(entry.get("keep_ratios", []), 1):
            self.writer.add_scalar("keep_ratio/stage_{}".format(stage), ratio, entry["epoch"])
        self.writer.flush()
