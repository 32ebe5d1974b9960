"""What every model with slow and fast tokens offers, whatever its backbone: switches, and timm's model interface."""
from torch import nn

from .registry import square_side


def checked_ratio(ratio):
    """`ratio` as it is; raises ValueError unless it lies in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError("keep ratio {} is not above 0 and at most 1".format(ratio))
    return ratio


class EvoModel(nn.Module):
    """Base of the models. A family gives `forward_stages` and `forward_head`, names itself in `family` and its smallest
    image in `min_size`.

    Two execution modes share the weights: stage-wise (tokens selected once per stage) and layer-wise (in every block).

    Raises:
        ValueError: unsupported `img_size`, `keep_ratio`, `full_blocks` or `drop_path_rate`.
    """

    family = min_size = None

    def __init__(self, img_size, num_features, distillation, full_blocks, keep_ratio, drop_path_rate):
        super().__init__()
        if full_blocks < 1:
            raise ValueError("full_blocks {}: tokens have no score before the first block, so it is at least 1"
                             .format(full_blocks))
        if not 0 <= drop_path_rate < 1:
            raise ValueError("drop_path_rate {} is not at least 0 and below 1".format(drop_path_rate))
        self.img_size = square_side(img_size, self.family, self.min_size)
        self.num_features = self.head_hidden_size = num_features
        self.distillation = distillation
        self.distilled_training = False
        self.stage_wise = True
        self.token_selection = True
        self.keep_ratio = checked_ratio(keep_ratio)

    # Switches; both modes run on the same weights.

    def set_stage_wise(self, enabled):
        """Select tokens once per stage (True, as built) or anew in every block (False)."""
        self.stage_wise = bool(enabled)

    def set_token_selection(self, enabled):
        """Select tokens (True, as built) or update all of them in every block (False)."""
        self.token_selection = bool(enabled)

    def set_keep_ratio(self, ratio):
        """From now on let the share `ratio` of the patch tokens go the slow way wherever tokens are selected:
        int(N * ratio) of N, at least one. 1 keeps all, as if nothing were selected. Raises ValueError unless it lies in
        (0, 1]."""
        self.keep_ratio = checked_ratio(ratio)

    def set_distilled_training(self, enabled):
        """In training, give all heads' logits (True), or what eval gives (False, as built)."""
        self.distilled_training = bool(enabled)

    # timm's model interface.

    def check_images(self, x):
        """Raises ValueError unless the images x (B, 3, H, W) have the model's size."""
        if x.dim() != 4:
            raise ValueError("{} takes a batch of images (B, 3, H, W) and got {}".format(self.family, tuple(x.shape)))
        if tuple(x.shape[-2:]) != (self.img_size, self.img_size):
            raise ValueError("this {} was built for {} x {} images and got {} x {}; "
                             "build it with img_size set to the size of the images"
                             .format(self.family, self.img_size, self.img_size, x.shape[-2], x.shape[-1]))

    def forward_tokens(self, x):
        """Images (B, 3, H, H) -> (class token and patch tokens (B, 1 + N, C), TokenState of the patch tokens) of the
        last stage."""
        return self.forward_stages(x)[-1]

    def forward_intermediates(self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW",
                              intermediates_only=False):
        """Images (B, 3, H, H) -> (class token and patch tokens of the last stage, [patch tokens of each stage]), as
        timm's models give them.

        indices: stages to return, all if None, the last n for a number n. output_fmt: "NCHW" (B, C, n, n) or "NLC"
        (B, N, C). intermediates_only: return the list alone. norm and stop_early change nothing: there is no norm over
        tokens at the end, and all stages run. Raises ValueError for another format or a stage that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError("output_fmt {!r} is neither NCHW nor NLC".format(output_fmt))
        count = len(self.feature_info)
        if indices is None:
            indices = range(count)
        elif isinstance(indices, int):
            if not 0 <= indices <= count:
                raise ValueError("the last {} stages: there are {}".format(indices, count))
            indices = range(count - indices, count)
        if any(not -count <= index < count for index in indices):
            raise ValueError("indices {}: the stages are 0 to {}".format(list(indices), count - 1))
        stages = [tokens for tokens, _ in self.forward_stages(x)]
        features = [stages[index][:, 1:] for index in indices]
        if output_fmt == "NCHW":
            features = [f.transpose(1, 2).reshape(f.shape[0], f.shape[2], int(f.shape[1] ** 0.5), -1) for f in features]
        return features if intermediates_only else (stages[-1], features)

    def forward_features(self, x):
        """Images (B, 3, H, H) -> class token and patch tokens after the last block, (B, 1 + N, C)."""
        return self.forward_tokens(x)[0]

    def forward(self, x):
        return self.forward_head(self.forward_features(x))
