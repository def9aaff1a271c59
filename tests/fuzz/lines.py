"""The lines that random programs are made of: templates of Python expressions and statements.

{h}: hidden states. {w}: a weight. {x}: logits, with labels {t}. {l}: a loss. Other names are a program's arguments.
"""

FLAT = "{h}.reshape(-1, {h}.shape[-1])"
BACK = ".view(*{h}.shape[:-1], {w}.shape[0])"
HEADS = [
    "F.linear({h}, {w})",
    "F.linear({h}, {w}, b)",
    "{h} @ {w}.T",
    "torch.matmul({h}, {w}.t())",
    "torch.matmul({h}, {w}.mT) + b",
    "torch.einsum('...d,vd->...v', {h}, {w})",
    "torch.einsum('vd,...d->...v', {w}, {h})",
    f"torch.addmm(b, {FLAT}, {{w}}.mT, beta=0.5, alpha=2.0){BACK}",
    f"torch.addmm(b, {FLAT}, {{w}}.mT){BACK}",
    f"torch.mm({FLAT}, {{w}}.mT){BACK}",
    f"torch.baddbmm(b, {FLAT}[None], {{w}}.T[None])[0]{BACK}",
    f"torch.bmm({FLAT}[None], {{w}}.mT[None]).squeeze(0){BACK}",
    "({w} @ {h}.mT).mT",
    "F.linear({h}, {w}) + 0.5 * F.linear({h}.cos(), {w}.sin())",
    "torch.stack([F.linear({h}, {w}), F.linear({h}.sin(), {w})])[0]",
    "F.linear({h}, {w}[:, :1]) if {h}.shape[-1] == 1 else F.linear({h}, {w})",
]
WEIGHTS = [  # not with equal rows: the gradient of one, a sum over classes, is zero, and rounding all there is
    "w[:, :1].expand(w.shape)", "torch.zeros_like(w)", "w[1:]", "w[:-1]", "w.bfloat16()", "w.float()", "w * 0.5",
    "w.detach()", "w.t().contiguous().t()", "w.clone()", "w / (w.norm(dim=-1, keepdim=True) + 1)",
    "torch.cat([w, w])", "w * s", "w.flip(0)", "w[torch.arange(w.shape[0])]",
]  # fmt: skip
HIDDEN = [  # norms not of one or two numbers, nor of equal ones: their gradient is zero, and rounding all there is
    "torch.tanh(F.linear({h}, a))", "F.layer_norm(h, h.shape[-1:]) if h.shape[-1] > 2 else {h}",
    "F.dropout({h}, 0.25)", "{h} + {h}.sin()",
    "F.rms_norm(h, h.shape[-1:]) if h.shape[-1] > 2 else {h}", "{h}.bfloat16()", "{h}.float()",
    "{h}.transpose(0, -2).contiguous().transpose(0, -2)", "{h} * s", "{h} * 50", "{h} * 0", "{h}.detach()",
    "{h}[..., :1].expand({h}.shape)", "{h} * r.unsqueeze(-1)", "{h}.clone()", "F.embedding(ids, w)",
    "F.embedding(ids, w) + {h}",
]  # fmt: skip
ROWS = [  # on logits and labels alike
    "{x}.contiguous()", "{x}[None]", "{x}[0]", "{x}[-1]", "{x}[1:]", "{x}[:-1]", "{x}[::2]", "{x}.unsqueeze(0)",
    "{x}.squeeze(0)", "{x}.transpose(0, 1)", "{x}.flatten(0, 1)", "{x}.narrow(0, 1, 1)", "{x}.select(0, 1)",
    "{x}[torch.tensor([1, 0, 1])]", "{x}.index_select(0, torch.tensor([1, 0]))", "{x}.chunk(2)[0]",
    "{x}.chunk(2)[-1]", "{x}.split(1)[-1]", "{x}.tensor_split(2)[1]", "{x}.unbind(0)[0]", "{x}.unbind(0)[-1]",
    "{x}[:, 1:]", "{x}[:, 0]", "{x}[:, None]", "{x}[:, torch.tensor([1, 0])]", "{x}.movedim(0, 1)",
    "{x}.swapaxes(0, 1)", "{x}[0:]", "{x}[:, :]", "{x}.clone()", "{x}.view({x}.shape)", "torch.stack([{x}, {x}])[1]",
    "{x}.unflatten(0, (1, -1))", "{x}[None, :]", "{x}.reshape({x}.shape)", "{x}.squeeze()", "{x}.swapdims(0, 1)",
    "{x}[:0]", "{x}.expand({x}.shape)",
]  # fmt: skip
ODD_ROWS = [
    "{x}.flip(0)", "torch.cat([{x}, {x}])", "{x}.roll(1, 0)", "{x}.repeat_interleave(2, 0)", "{x}[[0, 1]]",
    "torch.stack([{x}, {x}])", "{x}[torch.tensor([True, False] * 9)[: {x}.shape[0]]]",
]  # fmt: skip
MAPS = [
    "{x} * 0.5", "2 * {x}", "{x} / 1.5", "{x} + 0.25", "1 - {x}", "-{x}", "{x} + b", "{x} - b", "{x} * s",
    "{x} / (1 + s * s)", "4 * torch.tanh({x} / 4)", "3 * torch.sigmoid({x})", "{x}.clamp(-1.5, 1.5)",
    "{x}.clamp(min=-1)", "{x}.relu()", "F.leaky_relu({x}, 0.1)", "F.silu({x})", "{x}.square()", "{x}.pow(3)",
    "torch.where({x} > 0.5, 0.5 + 0.1 * ({x} - 0.5), {x})", "{x} * torch.sigmoid({x})", "{x} + {x}",
    "{x} * {x}.detach()", "{x}.float()", "{x}.bfloat16()", "{x}.to(torch.float32)", "{x}.type_as(h)",
    "{x}.masked_fill(m, -inf)", "torch.where(m, -inf, {x})", "torch.where(m, {x}, -10.0)", "{x}.masked_fill(m, -3.0)",
    "{x}[..., :-1]", "{x}[..., 1:]", "{x}[..., :3]", "{x}.narrow(-1, 0, 2)", "{x}.clamp(max=2.0)", "{x} * c",
    "{x} / c", "{x} + b.detach()", "{x}.log_softmax(-1)", "{x} - {x}.logsumexp(-1, keepdim=True)", "{x}.exp() / 9",
    "torch.add({x}, b, alpha=0.5)", "torch.sub({x}, b, alpha=2)", "torch.rsub({x}, 1.0)", "{x}.detach()",
    "{x}.hardtanh()", "F.hardtanh({x})", "{x}.div(2.0)", "torch.minimum({x}, torch.tensor(1.0))",
    "{x}.neg()", "{x} + F.linear(h.sin(), w)", "{x}.index_fill(-1, torch.tensor([1]), -inf)",
]  # fmt: skip
WRITES = [
    "{x}.mul_(0.5)", "{x}.div_(2)", "{x}.add_(b)", "{x}.tanh_()", "{x}.clamp_(-2, 2)", "{x}.masked_fill_(m, -inf)",
    "{x}.mul_(s)", "{x}.sub_(1)", "F.relu({x}, inplace=True)", "{x}.neg_()", "{x}.add_({x})", "{x}.exp_()",
]  # fmt: skip
STATEMENTS = [  # without a value
    "{x} *= 0.5", "{x} += b", "{x} /= 2", "{x}[..., 1] = -inf", "{x}[..., m] = -5.0", "{x}[0] = 0.0",
    "{x}[..., -1:] = -inf", "h.mul_(0.5)", "t.clamp_(min=0)", "{t}[..., 0] = -100", "{t} = {t}.clone()", "n.add_(1)",
    "c.mul_(2)", "m.logical_not_()", "ids.zero_()", "r.zero_()", "with torch.no_grad(): b.add_(1)",
    "with torch.no_grad(): s.mul_(2)", "with torch.no_grad(): w.mul_(2)", "{t}.add_(1)", "{t}.clamp_(max=0)",
    "{x}[0].mul_(2)", "{x}[..., 0].mul_(2)", "{x}.view(-1).mul_(0.5)", "{x}.detach().mul_(2)", "t.zero_()",
    "{h}.mul_(2)", "{h}.add_(1)",
]  # fmt: skip
FLAT_PAIR = "{x}.reshape(-1, {x}.shape[-1]), {t}.reshape(-1)"
PICK = "{t}.clamp(min=0).unsqueeze(-1)"
CROSS_ENTROPY = [  # one of each
    ["weight=None", "weight=c", "weight=c.square()"],
    ["ignore_index=-100", "ignore_index=2", "ignore_index=-1", "ignore_index=0"],
    ["reduction='mean'", "reduction='sum'", "reduction='none'"],
    ["label_smoothing=0.0", "label_smoothing=0.0", "label_smoothing=0.2", "label_smoothing=1.0"],
]
MODES = [
    "torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', torch.bfloat16)",
    "torch.autocast('cpu', torch.bfloat16, enabled=False)",
]  # fmt: skip
LOSSES = [
    f"F.cross_entropy({FLAT_PAIR})",
    f"F.cross_entropy({FLAT_PAIR}, reduction='none')",
    f"F.cross_entropy({FLAT_PAIR}, c)",
    "F.cross_entropy({x}.flatten(0, -2).float(), {t}.flatten())",
    "F.cross_entropy({x}.mT, {t}, c, reduction='none')",
    "F.nll_loss({x}.log_softmax(-1).mT, {t}, reduction='none')",
    "{x}.log_softmax(-1).clone().mul_(2).sum(-1)",
    "F.cross_entropy({x}.movedim(-1, 1) if {x}.dim() > 1 else {x}, {t})",
    "F.cross_entropy({x}.movedim(-1, 1) if {x}.dim() > 1 else {x}, {t}, reduction='none')",
    "F.cross_entropy({x}, {t})",
    "F.nll_loss({x}.log_softmax(-1), {t})",
    "F.nll_loss(F.log_softmax({x}.reshape(-1, {x}.shape[-1]).float(), -1), {t}.reshape(-1), c.float())",
    f"{{x}}.log_softmax(-1).gather(-1, {PICK}).squeeze(-1)",
    f"-({{x}}.gather(-1, {PICK}).squeeze(-1) - {{x}}.logsumexp(-1))",
    f"({{x}}.logsumexp(-1) - {{x}}.gather(-1, {PICK})[..., 0]) * ({{t}} >= 0)",
    f"{{x}}.gather(-1, {PICK})",
    f"torch.take_along_dim({{x}}, {PICK}, -1)",
    "{x}.logsumexp(-1)",
    "{x}.logsumexp(-1).square().mean()",
    "{x}.float().logsumexp(dim=-1, keepdim=True)",
    "-{x}.log_softmax(-1).mean(-1)",
    "{x}.log_softmax(-1).sum()",
    "{x}.log_softmax(-1, dtype=torch.float32).sum(-1, keepdim=True)",
    "sum(F.cross_entropy(p, q, reduction='sum') for p, q in zip({x}, {t}))",
    "F.cross_entropy({x}.T, torch.arange({x}.shape[-1]) % {x}.shape[0])",
]
LOSS_OF = "F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten()"
CHECKPOINTS = [
    f"checkpoint(lambda h, w: {LOSS_OF}), {{h}}, {{w}}, use_reentrant=False)",
    f"checkpoint(lambda h, w: {LOSS_OF}, reduction='none'), {{h}}, {{w}}, use_reentrant=False)",
]
MAXIMA = [
    "{x}.argmax(-1)", "{x}.max(-1).values", "{x}.max(-1)[1]", "({x}.argmax(-1) == {t}).sum()", "{x}.detach().amax(-1)",
    "{x}.softmax(-1).max(dim=-1).values", "F.softmax({x}.detach(), -1).amax(-1)", "{x}.log_softmax(-1).argmax(-1)",
    "{x}.max(-1, keepdim=True).values",
]  # fmt: skip
ENTROPIES = [
    "-({x}.softmax(-1) * {x}.log_softmax(-1)).sum(-1)", "-({x}.log_softmax(-1).exp() * {x}.log_softmax(-1)).sum(-1)",
    "{x}.logsumexp(-1) - ({x}.softmax(-1) * {x}).sum(-1)", "Categorical(logits={x}).entropy()",
    "-({x}.detach().softmax(-1) * {x}.detach().log_softmax(-1)).sum(-1)", "({x} * {x}.softmax(-1)).sum(-1).mean()",
]  # fmt: skip
OTHERS = [  # need the logits
    "{x}.max()", "{x}.sum()", "{x}.softmax(-1)", "{x}.softmax(-1)[..., 0]",
    "F.dropout({x}, 0.25).sum()", "({x} * r.sum()).mean()", "{x}.std()", "n.copy_({x}.detach().mean())",
    "{x}.topk(1)[0]",
    "F.cross_entropy({x}.reshape(-1, {x}.shape[-1]), {x}.reshape(-1, {x}.shape[-1]).detach().softmax(-1))",
    "F.mse_loss({x}, torch.zeros_like({x}))", "{x}.square().sum(-1)", "{x}[..., 0]",
    "{x}.log_softmax(-1)[..., :2].sum(-1)", "{x}.softmax(-1).log().sum(-1)", "{x}.double().logsumexp(-1)",
    "F.log_softmax({x}, -1).gather(-1, {t}.clamp(min=0)[..., None].repeat(*[1] * {t}.dim(), 2))",
]  # fmt: skip
AFTER = [  # on a loss
    "{l} * 0.5", "{l}.mean()", "{l}.sum() / ({t} >= 0).sum()", "{l}.exp()", "{l}.detach()",
    "{l} + 0.01 * h.square().mean()", "{l}.sum()", "{l}.float()", "{l}.add_(1)", "{l}.mul_(2)", "{l}.view(-1)",
    "{l} / {t}.numel()", "{l}[..., None]", "{l}.square()", "({l} * r).sum()", "{l}.max()",
]  # fmt: skip
