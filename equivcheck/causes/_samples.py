"""EQ000 and EQ6xx: nothing matches, or the two runs cannot be compared."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ000",
        name="unexplained",
        summary="the update differs and no known cause accounts for it",
        because="no intervention, alone or together with others, brought the gradient back",
        mathematics="A != G beyond the noise of the control, and no hypothesis predicts A.",
        detected="the candidate is beyond the noise, and every suspicion was ruled out",
        proved="never: it is the absence of a proof, and the report lists what was ruled out",
        fix="read what was ruled out, then cut the loop down until a cause is named",
    ),
    Cause(
        code="EQ601",
        name="different-samples",
        summary="the two runs did not see the same samples",
        because="the order of the data, its sampler or its workers depend on the batch size",
        mathematics="""\
The samples consumed per optimizer step differ, so A and G are
gradients of different sums, and comparing them says nothing.""",
        detected="the samples consumed per optimizer step differ between the runs",
        proved="reading the same samples twice gives the same difference in the records",
        fix="draw sample indices from a sampler that does not know the batch size",
    ),
    Cause(
        code="EQ602",
        name="stochastic-step",
        summary="the same batch gives different gradients twice",
        because="something is drawn at random in each run: dropout, noise, augmentation",
        mathematics="""\
|G' - G| / |G| of two identical runs is far above rounding,
so A cannot be judged.""",
        detected="the control differs by more than rounding, and random operators were called",
        proved="repeating the unchanged full batch differs again",
        fix="seed inside the step: torch.manual_seed(step), or switch the random part off for the "
        "check",
        seen_in_the_wild=("openai/guided-diffusion#167", "allenai/OLMo-core#828"),
    ),
    Cause(
        code="EQ603",
        name="nondeterministic-step",
        summary="the same batch gives different gradients twice, without any random operator",
        because="an operator's result depends on the order of threads, or state survives between "
        "runs",
        mathematics="""\
|G' - G| / |G| of two identical runs is far above rounding,
so A cannot be judged.""",
        detected="the control differs by more than rounding, and no random operator was called",
        proved="repeating the unchanged full batch differs again",
        fix="torch.use_deterministic_algorithms(True), and no state outside build and train",
    ),
)
