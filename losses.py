"""The training loss: a base criterion on the true labels and a distillation term on the teacher's."""
import torch
import torch.nn.functional as F
from torch import nn

TYPES = ("none", "soft", "hard", "cls")


class DistillationLoss(nn.Module):
    """(1 - alpha) * base loss + alpha * distillation loss, as in DeiT and LeViT; `cls` is Evo-LeViT's own.

    Args:
        base_criterion: criterion(logits, labels).
        teacher_model: maps the images to logits (B, classes); not needed for "none".
        distillation_type: "none"; "soft": KL divergence at temperature `tau`; "hard": cross-entropy with the
            teacher's first choice; "cls": as hard, where patch and class-token heads count half each.
        alpha: weight of the distillation term.
        tau: temperature of "soft".
    """

    def __init__(self, base_criterion, teacher_model, distillation_type, alpha, tau):
        super().__init__()
        if distillation_type not in TYPES:
            raise ValueError("distillation type {!r} is not one of {}".format(distillation_type, ", ".join(TYPES)))
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, inputs, outputs, labels):
        """inputs: images (B, 3, H, W), for the teacher. outputs: logits (B, classes), or a tuple (patch, patch
        distillation, class, class distillation) of them, of which "none" takes the first, "soft" and "hard" the first
        two, "cls" all. labels: what the base criterion takes. Returns the scalar loss; raises ValueError where
        `outputs` has too few heads."""
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        heads = {"none": 1, "soft": 2, "hard": 2, "cls": 4}[self.distillation_type]
        if len(outputs) < heads:
            raise ValueError("{} distillation needs {} outputs of the model and got {}"
                             .format(self.distillation_type, heads, len(outputs)))

        base_loss = self.base_criterion(outputs[0], labels)
        if self.distillation_type == "none":
            return base_loss
        with torch.no_grad():
            teacher_logits = self.teacher_model(inputs)

        if self.distillation_type == "soft":
            tau = self.tau
            student = F.log_softmax(outputs[1] / tau, dim=1)
            teacher = F.log_softmax(teacher_logits / tau, dim=1)
            divergence = (teacher.exp() * (teacher - student)).sum()
            distillation_loss = divergence * tau * tau / outputs[1].numel()
        else:
            teacher_labels = teacher_logits.argmax(dim=1)
            distillation_loss = F.cross_entropy(outputs[1], teacher_labels)
            if self.distillation_type == "cls":
                base_loss = (base_loss + self.base_criterion(outputs[2], labels)) / 2
                distillation_loss = (distillation_loss + F.cross_entropy(outputs[3], teacher_labels)) / 2
        return (1 - self.alpha) * base_loss + self.alpha * distillation_loss
