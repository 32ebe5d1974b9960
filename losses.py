"""The training loss: a base criterion on the true labels and a distillation term on the teacher's."""
import torch
import torch.nn.functional as F
from torch import nn

TYPES = ("none", "soft", "hard", "cls")


class DistillationLoss(nn.Module):
    """(1 - alpha) * base loss + alpha * distillation loss, as in DeiT and LeViT; `cls` is Evo-LeViT's own.

    A term of weight zero is not computed, and neither is the teacher for it.

    Args:
        base_criterion: criterion(logits, labels).
        teacher_model: maps the images to logits (B, classes); not needed for "none" and for stored teacher labels.
        distillation_type: "none"; "soft": KL divergence at temperature `tau`; "hard": cross-entropy with the
            teacher's first choice; "cls": as hard, where patch and class-token heads count half each.
        alpha: weight of the distillation term.
        tau: temperature of "soft".
        every_head: both terms hold for each of the model's outputs (Evo-DeiT's patch and class head).
    """

    def __init__(self, base_criterion, teacher_model, distillation_type, alpha, tau, every_head=False):
        super().__init__()
        if distillation_type not in TYPES:
            raise ValueError("distillation type {!r} is not one of {}".format(distillation_type, ", ".join(TYPES)))
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = 0.0 if distillation_type == "none" else alpha
        self.tau = tau
        self.every_head = every_head

    @torch.no_grad()
    def teach(self, inputs):
        """What the loss needs of the teacher for images (B, 3, H, W): its logits (B, classes) for "soft", its first
        choices (B,) for "hard" and "cls", None where its term has no weight."""
        if self.alpha == 0:
            return None
        logits = self.teacher_model(inputs)
        return logits if self.distillation_type == "soft" else logits.argmax(dim=1)

    def placeholder(self, images, num_classes):
        """Something of the kind that `teach` gives for `images`, without asking the teacher."""
        if self.alpha == 0:
            return None
        if self.distillation_type == "soft":
            return torch.zeros(len(images), num_classes, device=images.device)
        return torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def forward(self, inputs, outputs, labels, taught=None):
        """inputs: images (B, 3, H, W), for the teacher. outputs: logits (B, classes), or a tuple (patch, patch
        distillation, class, class distillation) of them, of which "soft" and "hard" take the first two, "none" and
        "cls" all; with "none" and `every_head` a tuple of any length. labels: what the base criterion takes. taught:
        what `teach` gave for `inputs`, where it was asked before. Returns the scalar loss; raises ValueError where
        `outputs` has too few heads."""
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        pairs = self._pairs(len(outputs))
        loss = 0.0
        if self.alpha != 1:
            loss = (1 - self.alpha) * _mean([self.base_criterion(outputs[head], labels) for head, _ in pairs])
        if self.alpha != 0:
            taught = self.teach(inputs) if taught is None else taught
            loss = loss + self.alpha * _mean([self._distillation_loss(outputs[head], taught) for _, head in pairs])
        return loss

    def _pairs(self, count):
        """[(label head, distillation head)] of so many outputs."""
        if self.every_head:
            return [(head, head) for head in range(count)]
        if self.distillation_type == "none":  # a model that has several, as old timm's distilled ones, is asked for all
            return [(head, head) for head in range(count)]
        heads = {"soft": 2, "hard": 2, "cls": 4}[self.distillation_type]
        if count < heads:
            raise ValueError("{} distillation needs {} outputs of the model and got {}".format(
                self.distillation_type, heads, count))
        return [(0, 1), (2, 3)] if self.distillation_type == "cls" else [(0, 1)]

    def _distillation_loss(self, logits, taught):
        if self.distillation_type != "soft":
            return F.cross_entropy(logits, taught)
        student, teacher = (F.log_softmax(x / self.tau, dim=1) for x in (logits, taught))
        return (teacher.exp() * (teacher - student)).sum() * self.tau * self.tau / logits.numel()


def _mean(terms):
    return sum(terms) / len(terms)
