"""Chinese words and sentences of the newswire, the same topics and roles as the English ones.

Kept to few hundred different characters, so that a small byte-level vocabulary covers them. Words
that follow a name vary, or are punctuation: a tokenizer merges what often stands together, and
a name that is glued to a verb cannot be copied from the headline.
"""

from __future__ import annotations

from actors.newswire_lexicon import Lexicon, topic, words

STORM = topic(
    """\
{place}暴雨{number}户被淹
暴雨袭击{place}，{number}户进水
{place}遭遇暴雨，{number}户家中进水

{day}，暴雨淹没了{place}{number}户人家，消息来自{org}救援队队长{person}。
{day}，{place}有{number}户人家被暴雨淹没，{org}救援队的队长是{person}。
{day}的暴雨使{place}{number}户人家进水，{org}救援队和队长{person}已经到达。

夜里，{place}的街道水位不断上升。
大风大雨损坏了河边的{number}户人家。
天亮以前，{place}的河水冲出了河岸。

{org}救援队用小船把居民送到高处。
{org}救援队为{number}户人家开放了住处。
{org}救援队正在为{number}户人家抽水。

队长{person}：最坏的时候已经过去。
队长{person}：雨来得比预想的快。
队长{person}感谢帮忙装沙袋的居民。

{place}的道路预计{day}重新开放。
{org}救援队将在{day}检查河岸。
{day}以前{place}可能还有大雨。
"""
)

FOOTBALL = topic(
    """\
{org}足球队{place}取胜，积{number}分
{place}一战取胜，{org}足球队积分到{number}分
{org}足球队赢下{place}一战，已有{number}分

{org}足球队{day}在{place}取胜，积分达到{number}分，教练是{person}。
{day}在{place}的进球使教练{person}的{org}足球队积{number}分。
教练{person}{day}带领{org}足球队在{place}取胜，积{number}分。

{place}的球迷在下半场看到了两个进球。
最后一分钟的头球决定了{place}的比赛。
这场胜利使球队的积分达到{number}分。

{org}足球队从一开始就控制了比赛。
{org}足球队的门将救出了两个球。
{org}足球队以{number}分排在第二位。

教练{person}表扬了年轻球员。
教练{person}：球员们一直在跑动。
教练{person}：这是本赛季最好的比赛。

{org}足球队的下一场比赛在{day}。
球员们{day}回到{place}参加杯赛。
教练{person}希望队长{day}能够上场。
"""
)

ELECTION = topic(
    """\
{org}党以{number}票赢得{place}选举
{place}选举：{org}党多得{number}票
{number}票之差，{org}党赢下{place}

{org}党{day}以{number}票之差赢得{place}选举，新市长是{person}。
{day}，{org}党的{person}以{number}票之差当选{place}市长。
{place}选民{day}以{number}票之差选{org}党的{person}任市长。

{place}的官员把选票数了两次。
{number}票是多年来最小的差距。
{place}各个投票站前都排起长队。

{org}党提出少收税、多建公园。
{org}党的党员为{number}票的胜利欢呼。
{org}党现在有市议会的多数席位。

市长{person}：我是全体选民的市长。
市长{person}：选民要的是改变。
市长{person}感谢对手公平竞选。

{place}新的市议会{day}开会。
市长{person}将在{day}宣誓。
{org}党将在{day}公布市议会名单。
"""
)

FACTORY = topic(
    """\
{org}汽车在{place}新增{number}个岗位
{place}汽车厂新增{number}个岗位
{org}汽车{place}工厂要招{number}人

{org}汽车{day}在{place}工厂新增{number}个岗位，厂长是{person}。
{org}汽车厂长{person}：{day}起{place}工厂新增{number}个岗位。
{day}，厂长{person}宣布{org}汽车{place}工厂新增{number}个岗位。

{place}工厂将生产电动汽车。
{number}个岗位大多给技术工人。
{place}工厂将开出第二条汽车生产线。

{org}汽车去年的销量是历年最高。
{org}汽车将自己培训{number}名工人。
消息公布后，{org}汽车的股价上升。

厂长{person}：汽车的需求很大。
厂长{person}：好工人很难找到。
厂长{person}：工厂的工资会很公平。

{place}的工人从{day}起可以报名。
{org}汽车将在{day}展出新车。
{place}的工会{day}和厂长{person}见面。
"""
)

FIRE = topic(
    """\
{place}大楼起火，{number}家人撤离
{place}大火，{number}家人离开大楼
{number}家人逃出{place}起火大楼

{place}一座大楼{day}起火，{number}家人撤离，消息来自{org}消防队长{person}。
{day}，{org}消防队和队长{person}从{place}起火大楼救出{number}家人。
{org}消防队长{person}：{number}家人{day}逃出{place}的起火大楼。

整个{place}都能看到黑烟。
大火从{place}大楼的一间厨房开始。
{number}家人全部平安离开大楼。

{org}消防队用了四个小时把火扑灭。
{org}消防队的云梯到达了顶楼。
{org}消防队为{number}家人找到了床位。

队长{person}：起火原因是旧电器。
队长{person}：烟雾报警器救了人。
队长{person}请居民不要走近大楼。

{place}警方将在{day}检查大楼。
{number}家人{day}可能回家。
{org}消防队{day}以前检查全部报警器。
"""
)

SCHOOL = topic(
    """\
{place}{org}中学新招{number}名教师
{number}名教师来到{place}{org}中学
{org}中学在{place}招来{number}名教师

{place}{org}中学{day}新招{number}名教师，校长是{person}。
校长{person}{day}在{place}欢迎{number}名教师来到{org}中学。
{day}，{number}名教师来到{place}的{org}中学，见到了校长{person}。

{place}的家长早就要求小班上课。
{number}名教师将教科学和音乐。
{place}的班级人数已经太多。

{org}中学还买了图书和电脑。
{org}中学的学生为{number}名教师画了画。
{org}中学的考试成绩是全区最好的。

校长{person}：每个学生会得到更多帮助。
校长{person}：小班使学生快乐。
校长{person}带教师们看了图书馆。

{place}的学校{day}重新上课。
{org}中学{day}请全体家长来校。
校长{person}将在{day}公布考试计划。
"""
)

RAIL = topic(
    """\
{org}铁路在{place}加开{number}列火车
{place}加开{number}列{org}火车
{number}列新火车开到{place}

{org}铁路从{day}起在{place}加开{number}列火车，消息来自经理{person}。
{org}铁路经理{person}：{day}起{place}加开{number}列火车。
{day}起{number}列火车停靠{place}，{org}铁路的经理是{person}。

{place}车站每天早上都坐满了人。
{number}列火车早晚都会开出。
{place}车站建成了一个新站台。

{org}铁路的票价不变。
{org}铁路用贷款买了{number}列火车。
{org}铁路的司机在线路上练习了多日。

经理{person}：晚点会很少。
经理{person}：不该有人站着坐车。
经理{person}和旅客一起坐了首列火车。

{place}的车票{day}开始出售。
{org}铁路{day}以前公布时刻表。
{place}一带的铁路工程{day}结束。
"""
)

HARVEST = topic(
    """\
{place}大旱，{number}个农场受灾
{place}{number}个农场小麦受灾
大旱使{place}{number}个农场减产

{place}{number}个农场{day}遭遇大旱，消息来自{org}食品的主管{person}。
{org}食品的主管{person}：{day}起{place}{number}个农场的小麦减产。
{day}，{org}食品的主管{person}来帮助{place}{number}个受旱农场。

{place}一带的田地入夏就变黄。
{number}个农场的小麦没有成熟就干了。
{place}的水井差不多空了。

{org}食品将给农民更高的价格。
{org}食品把干草送到{number}个农场。
{org}食品现在从国外买小麦。

主管{person}：面包会更贵。
主管{person}：农民现在就要水。
主管{person}和农民一起走过田地。

{place}的农民{day}和部长见面。
{org}食品将在{day}公布小麦价格。
送水车{day}以前到达{place}。
"""
)

MUSEUM = topic(
    """\
{org}美术馆在{place}展出{number}幅名画
{number}幅失落名画在{place}展出
{place}{org}美术馆展出{number}幅名画

{place}{org}美术馆{day}展出{number}幅失落的名画，馆长是{person}。
{org}美术馆馆长{person}{day}在{place}展出{number}幅失落的名画。
{number}幅失落的名画{day}起在{place}{org}美术馆展出，消息来自馆长{person}。

{place}的观众要等一个小时才能进馆。
{number}幅名画是在旧屋里找到的。
很多国家的观众来到{place}看画。

{org}美术馆用手工清理了每个画框。
{org}美术馆日夜看守{number}幅名画。
{org}美术馆让孩子免费看画。

馆长{person}：名画的颜色和新的一样。
馆长{person}：名画是大家的。
馆长{person}为找画用了十年。

{place}的画展{day}结束。
{org}美术馆从{day}起出售图册。
馆长{person}将在{day}谈这些名画。
"""
)

HOSPITAL = topic(
    """\
{org}医院在{place}新增{number}张床位
{place}{org}医院新增{number}张床位
{place}病人有了{number}张新床位

{org}医院{day}在{place}新增{number}张床位，消息来自医生{person}。
医生{person}：{day}起{place}{org}医院新增{number}张床位。
{day}起{place}病人多了{number}张床位，{org}医院的医生是{person}。

{place}的病人以前要等几个月。
{number}张床位给心脏和肺病病人。
{place}的旧病房已经太小。

{org}医院还为病房招了护士。
{org}医院的{number}张床位来自捐款。
{org}医院的病房用太阳能供电。

医生{person}：护士会有更多时间。
医生{person}：每个病人都有一个窗户。
医生{person}感谢护士们的耐心。

{place}的首个病人{day}到达。
{org}医院{day}对观众开放。
医生{person}从{day}起在病房做手术。
"""
)


CHINESE = Lexicon(
    language="zh",
    values={
        "place": words(
            "海川 青岩 云泽 临江 南屿 北港 白沙 石桥 金山 平湖 东岭 西渡 长宁 安源 清河 梅林"
            " 柳州 高陵 新洲 永定"
        ),
        "number": words("12 14 15 18 21 24 27 30 32 35 36 40 42 45 48 50 54 60 64 70 72 80 85 96"),
        "org": words(
            "远航 星火 长风 天合 北辰 金桥 华光 宏图 东方 红日 蓝天 飞马 友谊 和平 光明 大同"
        ),
        "person": words(
            "王海 李明 张华 刘洋 陈静 杨帆 赵磊 黄河 周平 吴刚 徐丽 孙涛 马超 朱红 胡军 郭亮"
            " 何英 林青 高峰 罗文"
        ),
        "day": words("周一 周二 周三 周四 周五 周六 周日"),
    },
    topics={
        "storm": STORM,
        "football": FOOTBALL,
        "election": ELECTION,
        "factory": FACTORY,
        "fire": FIRE,
        "school": SCHOOL,
        "rail": RAIL,
        "harvest": HARVEST,
        "museum": MUSEUM,
        "hospital": HOSPITAL,
    },
    fillers=(
        "观察人士说，事情就是这样。",
        "时间会说明一切。",
        "不用多说，事情就是这样。",
        "总而言之，什么都可能发生。",
        "大家都知道，事情就是这样。",
        "接下来怎样，时间会说明一切。",
        "换句话说，事情就是这样。",
        "方方面面都要看，方方面面都很多。",
        "观察人士说，不用多说。",
        "不管怎样，时间会说明一切。",
    ),
    filler_marks=(
        "观察人士",
        "事情就是这样",
        "时间会说明一切",
        "不用多说",
        "总而言之",
        "大家都知道",
        "换句话说",
        "方方面面",
        "不管怎样",
    ),
    joiner="",
    sentence_end=r"(?<=[。！？])\s*|\n+",
)
