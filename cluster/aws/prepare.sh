#!/usr/bin/env bash
# Run once per account: creates the roles of aws.yaml, with minimal permissions, and its security group. Run it again after a
# change of the policies in this folder. Give the address that may connect by SSH, yours or a network, as ADDRESS/BITS.
#
#     cluster/aws/prepare.sh your-bucket 203.0.113.7/32
set -euo pipefail
bucket=$1 address=$2 region=us-west-2
here=$(cd "$(dirname "$0")" && pwd)
account=$(aws sts get-caller-identity --query Account --output text)
export AWS_DEFAULT_REGION=$region

group() { aws ec2 describe-security-groups --filters Name=group-name,Values=beeline --query 'SecurityGroups[0].GroupId' --output text; }
if [ "$(group)" = None ]; then
    aws ec2 create-security-group --group-name beeline --description "Machines of a Ray cluster" >/dev/null
    aws ec2 authorize-security-group-ingress --group-id "$(group)" --protocol all --source-group "$(group)" >/dev/null
    aws ec2 authorize-security-group-ingress --group-id "$(group)" --protocol tcp --port 22 --cidr "$address" >/dev/null
fi

filled() { sed -e "s/your-bucket/$bucket/g; s/your-account/$account/g; s/sg-your-group/$(group)/g" "$here/$1.json"; }
for role in beeline-head beeline-worker; do
    aws iam get-role --role-name $role >/dev/null 2>&1 || {
        aws iam create-role --role-name $role --assume-role-policy-document "$(filled trust)" >/dev/null
        aws iam create-instance-profile --instance-profile-name $role >/dev/null
        aws iam add-role-to-instance-profile --instance-profile-name $role --role-name $role
    }
    aws iam put-role-policy --role-name $role --policy-name bucket --policy-document "$(filled bucket)"
done
aws iam put-role-policy --role-name beeline-head --policy-name launch --policy-document "$(filled launch)"
echo "Put this group into cluster/aws.yaml: SecurityGroupIds: [$(group)]"
