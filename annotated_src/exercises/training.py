"""Exercises on the loss, the step, and what a number says about a run."""

import math

import torch
from torch.nn import functional as F

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/07_training", "Training a small one")


@chapter.implement(
    title="the loss, and who shifts",
    minutes=10,
    difficulty="moderate",
    section="The loss, and its gradient",
    text="""
Write `next_token_loss`, without looking it up: the mean surprise at the next token, in
nats. The labels are the token ids themselves, so the shift is yours. A label of -100
asks for nothing and does not count. Compute in float32, whatever the logits are.
""",
    hints=(
        "The scores at $t$ are about token $t + 1$. Which scores answer no question, "
        "and which label does nobody ask for?",
        "Drop the last scores and the first label. Then one mean over all labels of "
        "the batch that count, whichever row they stand in.",
    ),
    proves="Each label that counts is scored by the place before it, all of them weigh "
    "the same, and the logits are widened to float32 first.",
    why="`cross_entropy` leaves out labels of -100, in the sum and in the count, "
    "unless told otherwise. So a long answer weighs more than a short one; a mean of "
    "the rows' means is another loss.",
)
def next_token_loss(logits, labels):
    """(B, T, V), ids (B, T) or -100 -> the mean loss, float32, of shape ()."""
    scores, wanted = logits[:, :-1].float(), labels[:, 1:]
    return F.cross_entropy(scores.flatten(0, 1), wanted.flatten())


@next_token_loss.cases
def _(draw):
    yield 2.0 * draw.integers(-2, 3, 1, 3, 2), torch.tensor([[0, 1, 1]])
    for rows, tokens, vocab_size, dtype in (
        (1, 4, 3, torch.float32),
        (3, 6, 5, torch.float32),
        (2, 7, 9, torch.bfloat16),
    ):
        logits = 3 * draw.normal(rows, tokens, vocab_size)
        labels = draw.integers(0, vocab_size, rows, tokens)
        labels[:, -3] = 0
        for row in range(rows):
            labels[row, : row + 1] = -100
        yield logits.to(dtype), labels
    yield 3 * draw.normal(2, 2, 3), torch.tensor([[0, 1], [2, 0]])


@next_token_loss.also("plain loops")
def _(logits, labels):
    total, count = 0.0, 0
    for scores, row in zip(logits.tolist(), labels.tolist(), strict=True):
        for t in range(len(row) - 1):
            if row[t + 1] != -100:
                whole = math.log(sum(math.exp(score) for score in scores[t]))
                total, count = total + whole - scores[t][row[t + 1]], count + 1
    return torch.tensor(total / count)


@next_token_loss.also("shift the labels, and gather")
def _(logits, labels):
    wanted = torch.full_like(labels, -100)
    wanted[:, :-1] = labels[:, 1:]
    asked = wanted != -100
    shares = logits.float()[asked].log_softmax(dim=-1)
    return -shares.gather(-1, wanted[asked][:, None]).mean()


@next_token_loss.also("the package")
def _(logits, labels):
    from annotated_src.loss import next_token_loss as ours

    return ours(logits.float(), labels)


def mean_loss(scores, wanted, **options):
    """Average the cross entropy over all labels but -100."""
    return F.cross_entropy(scores.float().flatten(0, 1), wanted.flatten(), **options)


@next_token_loss.mistake(
    "no shift",
    because="scores and labels have the same shape, and in a classifier they belong "
    "together; the loss falls fast, and the model learns to repeat",
    section="The checkpoint, and the ladder of equality",
)
def _(logits, labels):
    return mean_loss(logits, labels)


@next_token_loss.mistake(
    "shifted twice",
    because="many a loop shifts the labels before the call; this function shifts as "
    "well, so the model learns the token after the next one",
    section="The checkpoint, and the ladder of equality",
)
def _(logits, labels):
    return mean_loss(logits[:, :-2], labels[:, 2:])


@next_token_loss.mistake(
    "shifted the wrong way",
    because="both shapes fit, and one of the two must lose its first place; the scores "
    "of a token are not about the token before it",
)
def _(logits, labels):
    return mean_loss(logits[:, 1:], labels[:, :-1])


@next_token_loss.mistake(
    "the first token follows the last",
    because="`roll` shifts and keeps the shape, so nothing need be cut; but what it "
    "pushes out on one side comes in on the other",
)
def _(logits, labels):
    return mean_loss(logits, labels.roll(-1, dims=1))


@next_token_loss.mistake(
    "laid end to end, then shifted",
    because="one long row is easier to shift, and `cross_entropy` wants one; but then "
    "the end of each text is asked for the first token of the next",
    section="One pass, many lessons",
)
def _(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, 1)[:-1], labels.flatten()[1:])


@next_token_loss.mistake(
    "labels that do not count are counted",
    because="their loss is 0, and a mean of everything seems to leave them out; they "
    "still stand in the number that it divides by",
)
def _(logits, labels):
    wanted = labels[:, 1:]
    return mean_loss(logits[:, :-1], wanted, reduction="sum") / wanted.numel()


@next_token_loss.mistake(
    "a mean of the rows' means",
    because="a batch is a list of texts, and each should weigh the same; here each "
    "token does",
)
def _(logits, labels):
    pairs = zip(logits, labels, strict=True)
    losses = [mean_loss(x[None, :-1], y[None, 1:]) for x, y in pairs]
    return torch.stack(losses).mean()


@next_token_loss.mistake(
    "a sum for a mean",
    because="the probability of a text is a product, so its surprise is a sum; a loss "
    "that grows with the batch would need another rate for each",
)
def _(logits, labels):
    return mean_loss(logits[:, :-1], labels[:, 1:], reduction="sum")


@next_token_loss.mistake(
    "softmax before cross_entropy",
    because="cross entropy is defined on shares; torch's takes scores and makes the "
    "shares itself",
)
def _(logits, labels):
    return mean_loss(logits[:, :-1].float().softmax(dim=-1), labels[:, 1:])


@next_token_loss.mistake(
    "token 0 taken for padding",
    because="in many tokenizers id 0 is the padding; padding is told by -100, and id 0 "
    "is a token as good as any",
)
def _(logits, labels):
    wanted = labels[:, 1:]
    return mean_loss(logits[:, :-1], wanted.masked_fill(wanted == 0, -100))


@next_token_loss.mistake(
    "a loss in half precision",
    because="the logits came so, and torch asks for nothing else; in bfloat16 a loss "
    "of 2 moves in steps of 0.016",
)
def _(logits, labels):
    scores = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(scores, labels[:, 1:].flatten()).float()


@chapter.implement(
    title="warm-up and decay",
    minutes=10,
    difficulty="easy",
    section="The step",
    text="""
The rate of each step. In the first `warmup` steps (maybe none) it rises in equal parts;
the last of them has the `peak`, and the first is not 0. Then half a wave of the cosine,
which begins at the peak and comes to a tenth of it in the last step. (If one step is
all that is left for the wave, it has the peak.) Steps count from 0 to `steps - 1`.
""",
    hints=(
        "For step 0 to move anything, how must the warm-up count?",
        "After it, let a number go from 0 in step `warmup` to 1 in step `steps - 1`. "
        "What do you multiply a half wave by, and what do you add, to have 1 and 0.1 "
        "at its ends? And if there is only one step left?",
    ),
    proves="It begins above 0, reaches the peak with the warm-up's last step and a "
    "tenth of it with the last step of all, with no warm-up and with nothing else, "
    "too.",
    atol=1e-9,
    rtol=1e-6,
)
def learning_rate(step, steps, peak, warmup):
    """Find the rate of a step, 0 to steps - 1: a float."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@learning_rate.cases
def _(draw):
    yield from ((step, 9, 1.0, 4) for step in range(9))
    yield from ((step, 3, 2.0, 1) for step in range(3))
    yield 1, 2, 1.0, 1
    yield 2, 3, 1.0, 3
    yield 0, 5, 3e-3, 0
    steps, warmup = draw.integer(60, 99), draw.integer(10, 20)
    yield from ((step, steps, 3e-3, warmup) for step in range(0, steps, 7))
    yield steps - 1, steps, 3e-3, warmup


@learning_rate.also("a walk through the steps")
def _(step, steps, peak, warmup):
    rates = [peak * k / warmup for k in range(1, warmup + 1)]
    left = steps - warmup
    for i in range(left):
        wave = math.cos(math.pi * i / (left - 1)) if left > 1 else 1.0
        rates.append(peak * (0.55 + 0.45 * wave))
    return rates[step]


@learning_rate.also("a blend of both ends")
def _(step, steps, peak, warmup):
    if step + 1 <= warmup:
        return (step + 1) / warmup * peak
    done = (step - warmup) / (steps - 1 - warmup) if step > warmup else 0.0
    high = math.cos(math.pi / 2 * done) ** 2  # 1 at first, 0 at the end
    return high * peak + (1 - high) * peak / 10


@learning_rate.also("the package")
def _(step, steps, peak, warmup):
    from annotated_src.training import learning_rate as ours

    return ours(step, steps=steps, peak=peak, warmup=warmup)


def half_wave(done):
    """Fall from 1 to a tenth along half a wave, while done goes from 0 to 1."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def wrong_rate(
    rise=lambda step, warmup: (step + 1) / warmup,
    done=lambda step, steps, warmup: (step - warmup) / max(1, steps - 1 - warmup),
    fall=half_wave,
):
    """Make a learning_rate with another rise, another clock, or another fall."""

    def rate(step, steps, peak, warmup):
        if step < warmup:
            return peak * rise(step, warmup)
        return peak * fall(done(step, steps, warmup))

    return rate


learning_rate.mistake(
    "a first step of nothing",
    because="step 0 of a rise from 0 looks like 0; that step computes a gradient and "
    "throws it away, and the warm-up ends below the peak",
)(wrong_rate(rise=lambda step, warmup: step / warmup))
learning_rate.mistake(
    "the wave has begun before the warm-up ends",
    because="progress is `step / steps` in every loop; then the rate falls off its "
    "peak at once when the warm-up is over",
)(wrong_rate(done=lambda step, steps, warmup: step / max(1, steps - 1)))
learning_rate.mistake(
    "down to zero",
    because="the cosine in many libraries ends at 0; here the last steps still learn",
)(wrong_rate(fall=lambda done: 0.5 * (1 + math.cos(math.pi * done))))
learning_rate.mistake(
    "the tenth comes on top",
    because="a floor sounds like something to add; then the wave must be lower by as "
    "much, or it begins above the peak",
)(wrong_rate(fall=lambda done: 0.1 + 0.5 * (1 + math.cos(math.pi * done))))
learning_rate.mistake(
    "clipped at a tenth",
    because="a floor sounds like `max`; that stands still for the last fifth of the "
    "run, and bends where the wave does not",
)(wrong_rate(fall=lambda done: max(0.1, 0.5 * (1 + math.cos(math.pi * done)))))
learning_rate.mistake(
    "the end is never reached",
    because="there are `steps - warmup` steps after the warm-up; but between the first "
    "and the last of them is one less",
)(wrong_rate(done=lambda step, steps, warmup: (step - warmup) / (steps - warmup)))
learning_rate.mistake(
    "a straight line",
    because="that is the other common schedule; it falls fast at first, where the "
    "cosine stays near its peak",
)(wrong_rate(fall=lambda done: 1 - 0.9 * done))
learning_rate.mistake(
    "a quarter of the wave",
    because="the cosine first meets 0 at a quarter; so it falls fastest at the end, "
    "where it should come to rest",
)(wrong_rate(fall=lambda done: 0.1 + 0.9 * math.cos(math.pi / 2 * done)))


@chapter.implement(
    title="one step of AdamW",
    minutes=15,
    difficulty="moderate",
    section="The step",
    text=r"""
One step for one weight matrix, from its gradient and the two running means. Take
$\beta_1 = 0.9$, $\beta_2 = 0.95$, $\epsilon = 10^{-8}$, $\lambda = 0.1$. Steps count
from 1, and all tensors have one shape.
""",
    hints=(
        "Four things in order: two running means, what makes up for their start at 0, "
        "the move, the decay. Which of them sees the gradient?",
        "Weight decay takes its share of the *weight*, times the rate, and goes "
        "through no mean and no root.",
    ),
    proves="The new weight and both means are those of torch's AdamW, at the first "
    "step and later, for gradients from one to a hundred-millionth.",
    atol=1e-7,
    rtol=1e-5,
)
def adamw_step(w, g, m, u, step, rate):
    """Weight, gradient, mean, mean of squares, step, rate -> the new (w, m, u)."""
    m = 0.9 * m + 0.1 * g
    u = 0.95 * u + 0.05 * g**2
    move = (m / (1 - 0.9**step)) / ((u / (1 - 0.95**step)).sqrt() + 1e-8)
    return w - rate * 0.1 * w - rate * move, m, u


@adamw_step.cases
def _(draw):
    zero = torch.zeros(1, 2, dtype=torch.float64)
    w, g = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, -0.25]]).double()
    yield w, g, zero, zero, 1, 0.5
    yield w, 1e-8 * g, zero, zero, 1, 0.5
    for step in (2, 5):
        w, g, m, u = (draw.normal(3, 4, dtype=torch.float64) for _ in "wgmu")
        yield w, g, 0.1 * m, 0.1 * u.square() + 0.01, step, 0.2


@adamw_step.also("number by number")
def _(w, g, m, u, step, rate):
    out = [torch.empty_like(w) for _ in "wmu"]
    for i, (a, b, c, d) in enumerate(
        zip(*map(torch.flatten, (w, g, m, u)), strict=True)
    ):
        c, d = c + (b - c) / 10, d + (b * b - d) / 20
        fair, spread = c / (1 - 0.9**step), d / (1 - 0.95**step)
        a = a * (1 - rate / 10) - rate * fair / (math.sqrt(spread) + 1e-8)
        for tensor, value in zip(out, (a, c, d), strict=True):
            tensor.view(-1)[i] = value
    return tuple(out)


@adamw_step.also("in place, on copies")
def _(w, g, m, u, step, rate):
    m, u = m.clone().lerp_(g, 0.1), u.clone().mul_(0.95).addcmul_(g, g, value=0.05)
    spread = (u / (1 - 0.95**step)).sqrt_().add_(1e-8)
    shrunk = w.clone().mul_(1 - 0.1 * rate)
    return shrunk.addcdiv_(m, spread, value=-rate / (1 - 0.9**step)), m, u


def wrong_step(
    betas=(0.9, 0.95),
    fair=lambda mean, beta, step: mean / (1 - beta**step),
    spread=lambda u: u.sqrt() + 1e-8,
    sign=1,
):
    """Make an adamw_step with one thing changed."""

    def take(w, g, m, u, step, rate):
        m = betas[0] * m + (1 - betas[0]) * g
        u = betas[1] * u + (1 - betas[1]) * g**2
        move = fair(m, betas[0], step) / spread(fair(u, betas[1], step))
        return w - rate * 0.1 * w - sign * rate * move, m, u

    return take


adamw_step.mistake(
    "nothing makes up for the start at 0",
    because="the means settle after a while; before, with these betas, the first move "
    "is less than half as long, and the next ones are wrong as well",
)(wrong_step(fair=lambda mean, beta, step: mean))
adamw_step.mistake(
    "the decay goes into the gradient",
    because="the penalty on squares, which decay once was, has this gradient; Adam "
    "then divides it by the root, so weights with strong gradients hardly decay. The W "
    "in AdamW says that it does not",
)


def _(w, g, m, u, step, rate):
    g = g + 0.1 * w
    m, u = 0.9 * m + 0.1 * g, 0.95 * u + 0.05 * g**2
    move = (m / (1 - 0.9**step)) / ((u / (1 - 0.95**step)).sqrt() + 1e-8)
    return w - rate * move, m, u


@adamw_step.mistake(
    "decay at full strength",
    because="the paper writes it beside the step; in code it is multiplied by the "
    "rate, so that it warms up and falls with it",
)
def _(w, g, m, u, step, rate):
    m, u = 0.9 * m + 0.1 * g, 0.95 * u + 0.05 * g**2
    move = (m / (1 - 0.9**step)) / ((u / (1 - 0.95**step)).sqrt() + 1e-8)
    return w - 0.1 * w - rate * move, m, u


@adamw_step.mistake(
    "decay of what has moved already",
    because="two lines of code do two things, and the order seems free; both start "
    "from the same old weight, or the move is shortened, too",
)
def _(w, g, m, u, step, rate):
    m, u = 0.9 * m + 0.1 * g, 0.95 * u + 0.05 * g**2
    move = (m / (1 - 0.9**step)) / ((u / (1 - 0.95**step)).sqrt() + 1e-8)
    w = w - rate * move
    return w - rate * 0.1 * w, m, u


adamw_step.mistake(
    "eps inside the root",
    because="in norms it stands there; here a gradient of a hundred-millionth would "
    "then hardly move its weight",
)(wrong_step(spread=lambda u: (u + 1e-8).sqrt()))


@adamw_step.mistake(
    "eps before the correction",
    because="Adam's paper has a shorter form, in which the root is corrected after eps "
    "was added; eps then weighs more in the first steps, and is another number",
)
def _(w, g, m, u, step, rate):
    m, u = 0.9 * m + 0.1 * g, 0.95 * u + 0.05 * g**2
    spread = (u.sqrt() + 1e-8) / math.sqrt(1 - 0.95**step)
    return w - rate * 0.1 * w - rate * m / (1 - 0.9**step) / spread, m, u


adamw_step.mistake(
    "no root",
    because="both means look alike on paper; without the root a gradient twice as "
    "strong makes the move half as long",
)(wrong_step(spread=lambda u: u + 1e-8))
adamw_step.mistake(
    "the step counted from 0",
    because="loops do; the first step is 1 here, and a correction for one step more is "
    "too small",
)(wrong_step(fair=lambda mean, beta, step: mean / (1 - beta ** (step + 1))))
adamw_step.mistake(
    "betas swapped",
    because="nobody remembers which is which; the squares have the longer memory",
)(wrong_step(betas=(0.95, 0.9)))
adamw_step.mistake(
    "with the gradient",
    because="the update is often written with a plus and a direction; the gradient "
    "points up",
)(wrong_step(sign=-1))


chapter.explain(
    "first_guess_of_a_tied_head",
    title="what an untrained model says",
    minutes=5,
    difficulty="moderate",
    section="Where it begins",
    text=r"""
Give our model a *tied* head, and first weights of spread $\sigma = 0.02$. Before
training, which token does it think most likely to come next?
""",
    hints=(
        "What is in the residual stream, if the layers add little?",
        "The head compares the stream with every row of the embedding. Which row is "
        "most like it?",
    ),
    choices={
        "a": Choice(
            "None: all are about as likely.",
            r"With a head of its own, nearly so: its loss begins near $\ln V$. A tied "
            "head has a favourite.",
        ),
        "b": Choice(
            "The one that it has just read.",
            "The stream still holds the embedding $e$ of that token, and the row of "
            "the head that is most like $e$ is $e$ itself. If the layers added "
            r"nothing, its score would be $\sqrt D\, \lVert e \rVert \approx \sigma D "
            r"= 2.6$, against a spread of $\sigma \sqrt D \approx 0.2$ for the others. "
            "With what they add it is about 2.",
        ),
        "c": Choice(
            "The most frequent one.",
            "That is the first thing it *learns*. Before training it has seen no text.",
        ),
        "d": Choice(
            "Some token at random, the same at every place.",
            "That takes a stream that is alike at every place. It is not: it holds the "
            "token that was read there.",
        ),
    },
    right="b",
    why="Left to itself, an untrained tied model says one token for ever.",
)


chapter.explain(
    "gains_without_decay",
    title="why gains do not decay",
    minutes=5,
    difficulty="moderate",
    section="The annotated source",
    text="""
`adamw` lets matrices shrink a little at each step, and leaves the gains of the norms
alone. Why?
""",
    hints=(
        "Multiply all gains of a norm by 2. How must the matrices behind it change, so "
        "that the model stays the same?",
        "What is a gain that decays pulled towards? And what is a gain that does "
        "nothing?",
    ),
    choices={
        "a": Choice(
            "They are few, so it would make no difference.",
            "Few they are, but each scales a whole feature of the stream: what happens "
            "to one of them is not small.",
        ),
        "b": Choice(
            "Adam divides by the root of squares, so decay would have no effect.",
            "Decay in AdamW does not go through the division. It would pull each gain "
            "down by the same share as any other weight.",
        ),
        "c": Choice(
            "A norm divides by its own size, so the size of the gain is lost anyway.",
            "The gain comes *after* the division; twice the gain is twice the output.",
        ),
        "d": Choice(
            "Its size alone says nothing, and 0 is no good place to be pulled to.",
            "Double the gains and halve the matrices that read the norm's output: the "
            "same function. What decay is meant to keep small is the product, and the "
            "decay of the matrix does that already. Decay of the gain would pull it "
            "towards 0, where nothing passes at all; its neutral value is 1.",
        ),
    },
    right="d",
    why="A bias, likewise, belongs wherever it is needed.",
)


@chapter.debug(
    title="a batch in parts",
    minutes=10,
    difficulty="moderate",
    section="The step",
    text="""
A batch does not fit into memory, but its parts do. `backward` adds to what is in
`.grad` already, so the parts' gradients can be summed to that of the whole batch.
Somebody divides each part's loss by the number of parts. For windows of one length that
is right. Here some labels are -100, and it is wrong. Mend it. (The model is a single
matrix: scores are `x @ weight`.)
""",
    hints=(
        "Two parts, one with a single label that counts, one with nine. How much "
        "should each label weigh?",
        "Sum the losses of a part, and divide by a number that all parts share.",
    ),
    proves="The sum over the parts is the gradient of the mean over all labels that "
    "count, also when the parts have different numbers of them, or none.",
    why="A mean of means is the mean only if the means are over equally many. "
    "`num_items_in_batch` in transformers' `Trainer` is there for it: the labels are "
    "counted over the whole batch before the first part is run.",
)
def gradient_in_parts(weight, x, labels, num_parts):
    """(D, V), (rows, D), ids (rows,) or -100, a number -> the gradient, (D, V)."""
    weight = weight.clone().requires_grad_()
    count = (labels != -100).sum()
    for xs, wanted in zip(x.chunk(num_parts), labels.chunk(num_parts), strict=True):
        loss = F.cross_entropy(xs @ weight, wanted, reduction="sum") / count
        loss.backward()
    return weight.grad


@gradient_in_parts.broken(
    "a mean of means",
    because="windows of one length count equally many labels, and the recipe is from "
    "there",
)
def _(weight, x, labels, num_parts):
    weight = weight.clone().requires_grad_()
    for xs, wanted in zip(x.chunk(num_parts), labels.chunk(num_parts), strict=True):
        loss = F.cross_entropy(xs @ weight, wanted) / num_parts
        loss.backward()
    return weight.grad


@gradient_in_parts.cases
def _(draw):
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    yield torch.zeros(1, 2), x, torch.tensor([0, -100, 1, 0]), 2
    yield draw.normal(2, 3), draw.normal(4, 2), torch.tensor([2, 1, 0, 2]), 2
    yield draw.normal(2, 3), draw.normal(5, 2), torch.tensor([2, 1, 0, 2, -100]), 2
    labels = torch.tensor([3, -100, 1, -100, -100, -100, 2, 0, 1])
    yield draw.normal(3, 4), draw.normal(9, 3), labels, 3


@gradient_in_parts.also("each part weighed by its count")
def _(weight, x, labels, num_parts):
    total, count = torch.zeros_like(weight), int((labels != -100).sum())
    for xs, wanted in zip(x.chunk(num_parts), labels.chunk(num_parts), strict=True):
        asked = int((wanted != -100).sum())
        if asked:
            leaf = weight.clone().requires_grad_()
            mean = F.cross_entropy(xs @ leaf, wanted)
            total += torch.autograd.grad(mean, leaf)[0] * asked / count
    return total


@gradient_in_parts.also("the formula, label by label")
def _(weight, x, labels, num_parts):
    total, asked = torch.zeros_like(weight), labels != -100
    for row, label in zip(x[asked], labels[asked], strict=True):
        shares = (row @ weight).softmax(dim=-1)
        shares[label] -= 1  # the share, less one where the token came
        total += row[:, None] * shares
    return total / asked.sum()


def wrong_parts(loss_of, zero=False):
    """Make a gradient_in_parts with another loss of a part, or that forgets parts."""

    def gradient(weight, x, labels, num_parts):
        weight = weight.clone().requires_grad_()
        for xs, wanted in zip(x.chunk(num_parts), labels.chunk(num_parts), strict=True):
            if zero:
                weight.grad = None
            loss_of(xs @ weight, wanted, labels, num_parts).backward()
        return weight.grad

    return gradient


def part_of_mean(scores, wanted, labels, num_parts):
    """Give the part's share of the mean over the whole batch."""
    return F.cross_entropy(scores, wanted, reduction="sum") / (labels != -100).sum()


gradient_in_parts.equivalent(
    "for xs, wanted in zip(x.chunk(num_parts), labels.chunk(num_parts), strict=False):",
    because="there are as many labels as rows",
)
gradient_in_parts.mistake(
    "the gradient starts anew with each part",
    because="`zero_grad` stands before `backward` in every loop; here the parts belong "
    "to one step",
)(wrong_parts(part_of_mean, zero=True))
gradient_in_parts.mistake(
    "nothing divides",
    because="`backward` adds up, and adding is what was wanted; a sum of means grows "
    "with the number of parts",
)(
    wrong_parts(
        lambda scores, wanted, labels, parts: F.cross_entropy(scores, wanted),
    )
)
gradient_in_parts.mistake(
    "divided twice",
    because="the division by the number of parts was there before, and stayed when the "
    "count came",
)(wrong_parts(lambda s, w, labels, parts: part_of_mean(s, w, labels, parts) / parts))
gradient_in_parts.mistake(
    "rows for labels",
    because="the size of a part is its number of rows; what counts is how many of them "
    "ask for something",
)(
    wrong_parts(
        lambda scores, wanted, labels, parts: (
            F.cross_entropy(scores, wanted, reduction="sum") / len(labels)
        ),
    )
)
gradient_in_parts.mistake(
    "each part weighed by its rows",
    because="a mean of means is weighed by sizes; the size of a part is the number of "
    "its labels that count",
)(
    wrong_parts(
        lambda scores, wanted, labels, parts: (
            F.cross_entropy(scores, wanted) * len(wanted) / len(labels)
        ),
    )
)


chapter.explain(
    "too_good_to_be_true",
    title="a loss under 0.5",
    minutes=5,
    difficulty="easy",
    section="What it knows by heart",
    text="""
A colleague reports a training loss under 0.5 after 200 steps, with the right mask and
the right shift. Sampling gives fluent, sensible pages. What do you ask for first, and
what do you expect to see?
""",
    hints=(
        "How low can an honest loss on English be? Look at the end of the chapter's "
        "run.",
        "With the right mask and shift, where could it have the answers from?",
    ),
    choices={
        "a": Choice(
            "The loss on pages that it has not seen; worse than a blind guess.",
            "The model is reciting: with few pages and many steps even 0.2 million "
            "weights learn them by heart. On other pages it is sure of itself and "
            "wrong, which costs more than knowing nothing. Ask, too, how long the text "
            "is.",
        ),
        "b": Choice(
            "The loss on pages that it has not seen; about 0.5, as samples are fluent.",
            "Fluent samples show that it can write *these* pages. The low loss would "
            "be wonderful, if it held elsewhere; so low, it never does.",
        ),
        "c": Choice(
            "The learning rate; it must have been far too low.",
            "A rate that is too low gives a loss that is too high. This one is too "
            "good.",
        ),
        "d": Choice(
            "More samples, at other temperatures; some will be nonsense.",
            "They would be fluent as well: what it learnt by heart, it writes. Samples "
            "expose a missing shift or mask, and not a good memory.",
        ),
    },
    right="a",
)
